"""DeepSeek V3.2 and V4 (DSML): invocations whose parameters say themselves whether they are strings.

    <｜DSML｜function_calls>
    <｜DSML｜invoke name="get_weather">
    <｜DSML｜parameter name="city" string="true">Paris</｜DSML｜parameter>
    <｜DSML｜parameter name="days" string="false">2</｜DSML｜parameter>
    </｜DSML｜invoke>
    </｜DSML｜function_calls>

V4 calls the outer tag `tool_calls`.
"""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_CLOSERS = {
    "<｜DSML｜function_calls>": "</｜DSML｜function_calls>",
    "<｜DSML｜tool_calls>": "</｜DSML｜tool_calls>",
}
_STYLE = TagStyle(
    function="<｜DSML｜invoke",
    function_end="</｜DSML｜invoke>",
    parameter="<｜DSML｜parameter",
    parameter_end="</｜DSML｜parameter>",
    value_ends=("</｜DSML｜invoke>",),
    outer_ends=tuple(_CLOSERS.values()),
)


def _envelope(word: str) -> Envelope:
    return Envelope(
        open=f"<｜DSML｜{word}>\n",
        begin='<｜DSML｜invoke name="',
        middle='">\n',
        end="</｜DSML｜invoke>\n",
        close=f"</｜DSML｜{word}>",
        style="tags",
        parameter_begin='<｜DSML｜parameter name="',
        parameter_middle='" string="{is_string}">',
        parameter_end="</｜DSML｜parameter>\n",
        triggers=(f"<｜DSML｜{word}>",),
        special_tokens=("｜DSML｜",),
    )


class DeepSeekV32(ToolFormat):
    name = "deepseek_v32"
    aliases: tuple[str, ...] = ("deepseek_v3_2", "dsml")
    openers: tuple[str, ...] = tuple(_CLOSERS)
    markers: tuple[str, ...] = tuple(_CLOSERS.values())
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (Sign("｜DSML｜"), Sign(tokens=("｜DSML｜",)))
    envelope = _envelope("function_calls")

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_function_blocks(p, _STYLE)
        yield from p.read_close(_CLOSERS[opener])


FORMAT = DeepSeekV32()
