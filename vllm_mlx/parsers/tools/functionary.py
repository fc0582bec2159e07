"""MeetKai Functionary: every part of an answer names its recipient; `all` is the reader.

get_weather\\n{"city": "Paris"}>>>all\\nHere you are.                          v3.2 (its prompt ends with `>>>`)
<|recipient|>get_weather\\n<|content|>{"city": "Paris"}                        v2, v3
<function=get_weather>{"city": "Paris"}</function>                            v3.1
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls, read_named_call
from vllm_mlx.parsers.machine import Broken, Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import QWEN, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_FROM = "<|from|>assistant\n<|recipient|>"


class Functionary(ToolFormat):
    name = "functionary"
    aliases: tuple[str, ...] = ("meetkai", "functionary_v3_2")
    openers: tuple[str, ...] = (">>>", _FROM, "<|recipient|>", "<function=")
    markers: tuple[str, ...] = ("<|content|>", "<|from|>")
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (Sign(">>>all"), Sign("<|recipient|>"), Sign(tokens=("<|recipient|>", "<|content|>")))
    envelope = Envelope(begin=">>>", middle="\n", end="", triggers=(">>>",))

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from p.skip_space()
        if (yield from p.peek()) in ("{", "["):
            yield from read_bare_json_calls(p)
        else:
            yield from _read_part(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "<function=":
            p.unread(opener)
            yield from read_function_blocks(p, QWEN)
        elif opener == ">>>":
            yield from _read_part(p)
        else:
            name, _ = yield from p.collect_until("<|content|>", limit=256)
            if name.strip() == "all":
                p.settle()
            else:
                yield from read_named_call(p, name)


def _read_part(p: ToolParser) -> Steps[None]:
    """A recipient on a line of its own, then its content. Only known recipients count: `>>>` is Python's prompt too."""
    recipient = yield from p.accept(*(f"{name}\n" for name in (*p.tools, "all")))
    if recipient is None:
        raise Broken("")
    if recipient == "all\n":
        p.settle()
    else:
        yield from read_named_call(p, recipient)


FORMAT = Functionary()
