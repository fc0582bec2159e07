"""Muse Spark (ATEM): invocations with named parameters in a namespace of their own."""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_STYLE = TagStyle(
    function="<atem:invoke",
    function_end="</atem:invoke>",
    parameter="<atem:parameter",
    parameter_end="</atem:parameter>",
    outer_ends=("</atem:function_calls>",),
)


class MuseSpark(ToolFormat):
    name = "muse_spark"
    aliases = ("atem",)
    openers = ("<atem:function_calls>",)
    markers = ("</atem:function_calls>",)
    needs_special_tokens = True
    signs = (Sign("<atem:function_calls>"),)
    envelope = Envelope(
        open="<atem:function_calls>\n",
        begin='<atem:invoke name="',
        middle='">\n',
        end="</atem:invoke>\n",
        close="</atem:function_calls>",
        style="tags",
        parameter_begin='<atem:parameter name="',
        parameter_middle='">',
        parameter_end="</atem:parameter>\n",
        triggers=("<atem:function_calls>",),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_function_blocks(p, _STYLE)
        yield from p.read_close("</atem:function_calls>")


FORMAT = MuseSpark()
