"""IBM Granite: `<|tool_call|>[{...}]` (3.x), `<tool_call>{...}</tool_call>` (4), `<function_call> {...}` (20B FC)."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_call_tag import TAG_OPENERS, read_tool_call_tag
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Granite(ToolFormat):
    name = "granite"
    aliases: tuple[str, ...] = ("granite3", "granite_20b_fc")
    openers: tuple[str, ...] = ("<|tool_call|>", *TAG_OPENERS, "<function_call>")
    markers: tuple[str, ...] = ("</tool_call>",)
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (
        Sign("<|tool_call|>"),
        Sign("<|function_call_library|>"),
        Sign(tokens=("<|tool_call|>",)),
    )
    envelope = Envelope(
        open="<|tool_call|>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        close="]",
        triggers=("<|tool_call|>",),
        special_tokens=("<|tool_call|>",),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener in TAG_OPENERS:
            yield from read_tool_call_tag(p)
        else:
            yield from read_json_calls(p)


FORMAT = Granite()
