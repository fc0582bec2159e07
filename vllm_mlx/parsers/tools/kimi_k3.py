"""Kimi K3 (XTML): tags made of tokens; every argument names its type, or all of them are one JSON block.

<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|>
<|open|>argument key="city" type="string"<|sep|>Paris<|close|>argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>
"""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_OPEN, _CLOSE = "<|open|>tools<|sep|>", "<|close|>tools<|sep|>"
_STYLE = TagStyle(
    function="<|open|>call",
    function_end="<|close|>call<|sep|>",
    parameter="<|open|>argument",
    parameter_end="<|close|>argument<|sep|>",
    outer_ends=(_CLOSE,),
    head_end="<|sep|>",
    function_attribute="tool",
    parameter_attribute="key",
    json_block='<|open|>json type="object"<|sep|>',
    json_block_end="<|close|>json<|sep|>",
)


class KimiK3(ToolFormat):
    name = "kimi_k3"
    aliases = ("xtml",)
    openers = (_OPEN,)
    markers = (_CLOSE, _STYLE.function_end, _STYLE.parameter_end)
    needs_special_tokens = True
    signs = (Sign("<|open|>", "<|sep|>", "<|close|>"), Sign(tokens=("<|open|>", "<|sep|>", "<|close|>")))
    envelope = Envelope(
        open=_OPEN,
        begin='<|open|>call tool="',
        middle='" index="1"<|sep|><|open|>json type="object"<|sep|>',
        end="<|close|>json<|sep|><|close|>call<|sep|>",
        close=_CLOSE,
        triggers=(_OPEN,),
        special_tokens=("<|open|>", "<|sep|>", "<|close|>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_function_blocks(p, _STYLE)
        yield from p.read_close(_CLOSE)


FORMAT = KimiK3()
