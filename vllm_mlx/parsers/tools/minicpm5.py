"""MiniCPM5: `<function name="f"><param name="a">1</param></function>`, values with markup in CDATA, no outer tag."""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_STYLE = TagStyle(
    function="<function",
    function_end="</function>",
    parameter="<param",
    parameter_end="</param>",
    has_cdata=True,
)


class MiniCpm5(ToolFormat):
    name = "minicpm5"
    aliases = ("minicpm",)
    openers = ("<function name=",)
    signs = (Sign('<function name="', '<param name="'),)
    envelope = Envelope(
        begin='<function name="',
        middle='">',
        end="</function>",
        separator="\n",
        style="tags",
        parameter_begin='<param name="',
        parameter_middle='">',
        parameter_end="</param>",
        triggers=('<function name="',),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        p.unread(opener)
        yield from read_function_blocks(p, _STYLE)


FORMAT = MiniCpm5()
