"""Llama 4 and other models that answer with a Python list of calls: `[get_weather(city="Paris"), now()]`.

The list is the whole answer, or stands between `<|python_start|>` and `<|python_end|>` (Llama 4) or in
`<function_calls>`, one call a line (OLMo 3). Without a marker it is a call only when it names a tool of the request.
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.python_calls import read_python_calls
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_CLOSERS = {"<|python_start|>": "<|python_end|>", "<function_calls>": "</function_calls>"}


class Llama4(ToolFormat):
    name = "llama4"
    aliases: tuple[str, ...] = ("llama4_pythonic", "pythonic", "toolace")
    openers: tuple[str, ...] = tuple(_CLOSERS)
    markers: tuple[str, ...] = tuple(_CLOSERS.values())
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (
        Sign("[func_name1(param"),
        Sign("<|python_start|>"),
        Sign(tokens=("<|python_start|>", "<|python_end|>")),
    )
    envelope = Envelope(open="[", begin="", middle="(", end=")", separator=", ", close="]", style="python")

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from p.skip_space()
        if (yield from p.peek()) == "[":
            yield from read_python_calls(p, is_bare=True)
        else:
            yield from read_bare_json_calls(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_python_calls(p)
        yield from p.read_close(_CLOSERS[opener])


FORMAT = Llama4()
