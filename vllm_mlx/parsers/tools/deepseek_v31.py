"""DeepSeek V3, R1 and V3.1: calls between tokens with a block character in their names.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>      V3.1
...<｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME\\n```json\\n{...}\\n```<｜tool▁call▁end｜>...              V3, R1
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_named_call
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, SEP, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"


class DeepSeekV31(ToolFormat):
    name = "deepseek_v31"
    aliases: tuple[str, ...] = ("deepseek_v3_1",)
    openers: tuple[str, ...] = (CALLS, CALL)
    markers: tuple[str, ...] = (SEP, CALL_END, CALLS_END)
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (Sign(CALL), Sign(tokens=(CALL, SEP)))
    envelope = Envelope(
        open=CALLS,
        begin=CALL,
        middle=SEP,
        end=CALL_END,
        close=CALLS_END,
        triggers=(CALLS,),
        special_tokens=(CALLS, CALL, SEP, CALL_END, CALLS_END),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == CALLS:
            yield from p.skip_space()
            yield from p.expect(CALL)
        while True:
            yield from _read_call(p)
            yield from p.skip_space()
            if (yield from p.accept(CALL)) is None:
                break
        yield from p.accept(CALLS_END)
        p.settle()


def _read_call(p: ToolParser) -> Steps[None]:
    name, _ = yield from p.collect_until(SEP, limit=256)
    yield from p.skip_space()
    if name.strip() == "function" and (yield from p.peek()) != "{":
        name, _ = yield from p.collect_until("\n", limit=256)
        yield from p.skip_space()
        yield from p.accept("```json", "```")
    yield from read_named_call(p, name, empty_before=(CALL_END, "```"))
    yield from p.skip_space()
    yield from p.accept("```")
    yield from p.read_close(CALL_END, CALLS_END, unread=(CALLS_END,))


FORMAT = DeepSeekV31()
