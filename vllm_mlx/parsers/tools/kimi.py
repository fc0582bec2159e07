"""Kimi K2: a section of calls; a call's id is `functions.NAME:NUMBER` and is passed on, its template wants it back.

<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>{...}
<|tool_call_end|><|tool_calls_section_end|>
"""

from __future__ import annotations

import re

from vllm_mlx.parsers.json_calls import read_named_call
from vllm_mlx.parsers.machine import Broken, Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_SECTION, _SECTION_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
_CALL, _ARGUMENTS, _CALL_END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
_ENDS = (_SECTION_END, "<|tool_call_section_end|>")
_HEAD = re.compile(r"(?:functions\.)?(?P<name>[\w.-]+?)(?P<number>:\d+)?\Z")


class Kimi(ToolFormat):
    name = "kimi"
    aliases = ("kimi_k2", "moonshot")
    openers = (_SECTION, "<|tool_call_section_begin|>", _CALL)
    markers = (*_ENDS, _ARGUMENTS, _CALL_END)
    needs_special_tokens = True
    signs = (Sign(_SECTION), Sign(tokens=(_SECTION,)))
    envelope = Envelope(
        open=_SECTION,
        begin=f"{_CALL}functions.",
        middle=_ARGUMENTS,
        end=_CALL_END,
        close=_SECTION_END,
        is_counted=True,
        triggers=(_SECTION,),
        special_tokens=(_SECTION, _CALL, _ARGUMENTS, _CALL_END, _SECTION_END),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener != _CALL:
            yield from p.skip_space()
            yield from p.expect(_CALL)
        while True:
            yield from _read_call(p)
            yield from p.skip_space()
            if (yield from p.accept(_CALL)) is None:
                break
        yield from p.accept(*_ENDS)
        p.settle()


def _read_call(p: ToolParser) -> Steps[None]:
    text, _ = yield from p.collect_until(_ARGUMENTS, limit=256)
    head = _HEAD.match(text.strip())
    if head is None:
        raise Broken(f"{text[:40]!r} is not a tool's name")
    id = text.strip() if head["number"] else None
    yield from read_named_call(p, head["name"], id, empty_before=(_CALL_END,))
    yield from p.read_close(_CALL_END, *_ENDS, unread=_ENDS)


FORMAT = Kimi()
