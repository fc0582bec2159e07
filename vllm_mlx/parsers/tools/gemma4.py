"""Gemma 4: keys without quotes, strings between marks of their own.

<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:2}<tool_call|>
"""

from __future__ import annotations

from vllm_mlx.parsers.gemma_calls import read_gemma_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser
from vllm_mlx.parsers.values import Dialect

_QUOTE = '<|"|>'
_DIALECT = Dialect(has_bare_strings=True, quotes=(_QUOTE,))


class Gemma4(ToolFormat):
    name = "gemma4"
    aliases = ("gemma_4",)
    openers = ("<|tool_call>",)
    markers = ("<tool_call|>", _QUOTE)
    needs_special_tokens = True
    signs = (Sign("<|tool_call>"), Sign(tokens=("<|tool_call>", "<tool_call|>")))
    envelope = Envelope(
        begin="<|tool_call>call:",
        middle="{",
        end="}<tool_call|>",
        style="gemma",
        quote=_QUOTE,
        triggers=("<|tool_call>",),
        special_tokens=("<|tool_call>", "<tool_call|>", _QUOTE),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_gemma_calls(p, _DIALECT)
        yield from p.read_close("<tool_call|>")


FORMAT = Gemma4()
