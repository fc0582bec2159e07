"""LFM2 and LFM2.5 (Liquid AI): `<|tool_call_start|>[get_weather(city="Paris")]<|tool_call_end|>`; JSON is read too."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.python_calls import read_python_calls
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Liquid(ToolFormat):
    name = "liquid"
    aliases = ("liquidai", "lfm", "lfm2", "lfm2_5")
    openers = ("<|tool_call_start|>",)
    markers = ("<|tool_call_end|>",)
    needs_special_tokens = True
    signs = (
        Sign("<|tool_call_start|>"),
        Sign("<|tool_list_start|>"),
        Sign(tokens=("<|tool_call_start|>", "<|tool_call_end|>")),
    )
    envelope = Envelope(
        open="<|tool_call_start|>[",
        begin="",
        middle="(",
        end=")",
        separator=", ",
        close="]<|tool_call_end|>",
        style="python",
        triggers=("<|tool_call_start|>",),
        special_tokens=("<|tool_call_start|>", "<|tool_call_end|>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from p.skip_space()
        if (yield from p.looking_at("{", "[{")) is not None:
            yield from read_json_calls(p)
        else:
            yield from read_python_calls(p)
        yield from p.read_close("<|tool_call_end|>")


FORMAT = Liquid()
