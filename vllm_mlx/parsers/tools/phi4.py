"""Phi-4-mini: `<|tool_call|>[{...}]<|/tool_call|>`, or `functools[{...}]`."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Phi4(ToolFormat):
    name = "phi4"
    aliases = ("phi_4", "phi4_mini", "phi4_mini_json")
    openers = ("<|tool_call|>", "functools[")
    markers = ("<|/tool_call|>",)
    needs_special_tokens = True
    signs = (
        Sign("<|tool_call|>", "<|/tool_call|>"),
        Sign("<|tool|>", "<|/tool|>"),
        Sign("functools["),
        Sign(tokens=("<|/tool_call|>",)),
    )
    envelope = Envelope(
        open="<|tool_call|>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        close="]<|/tool_call|>",
        triggers=("<|tool_call|>",),
        special_tokens=("<|tool_call|>", "<|/tool_call|>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "functools[":
            p.unread("[")
            yield from read_json_calls(p)
        else:
            yield from read_json_calls(p)
            yield from p.read_close("<|/tool_call|>")


FORMAT = Phi4()
