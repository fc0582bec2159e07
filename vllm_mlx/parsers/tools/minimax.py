"""MiniMax-M2: invocations with named parameters, several in one block. M1's JSON lines in `<tool_calls>` are read too.

<minimax:tool_call>
<invoke name="get_weather">
<parameter name="city">Paris</parameter>
</invoke>
</minimax:tool_call>
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_STYLE = TagStyle(
    function="<invoke",
    function_end="</invoke>",
    parameter="<parameter",
    parameter_end="</parameter>",
    value_ends=("\n<parameter name=", "</invoke>\n</minimax:tool_call>"),
    outer_ends=("</minimax:tool_call>",),
)


class MiniMax(ToolFormat):
    name = "minimax"
    aliases = ("minimax_m2", "minimax_m1")
    openers = ("<minimax:tool_call>", "<tool_calls>")
    markers = ("</minimax:tool_call>", "</tool_calls>")
    needs_special_tokens = True
    signs = (Sign("<minimax:tool_call>"), Sign(tokens=("<minimax:tool_call>",)))
    envelope = Envelope(
        open="<minimax:tool_call>\n",
        begin='<invoke name="',
        middle='">\n',
        end="</invoke>\n",
        close="</minimax:tool_call>",
        style="tags",
        parameter_begin='<parameter name="',
        parameter_middle='">',
        parameter_end="</parameter>\n",
        triggers=("<minimax:tool_call>",),
        special_tokens=("<minimax:tool_call>", "</minimax:tool_call>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "<tool_calls>":
            yield from p.skip_space()
            while (yield from p.peek()) in ("{", "["):
                yield from read_json_calls(p)
                yield from p.skip_space()
            yield from p.read_close("</tool_calls>")
        else:
            yield from read_function_blocks(p, _STYLE)
            yield from p.read_close("</minimax:tool_call>")


FORMAT = MiniMax()
