"""Seed-OSS: Qwen3-Coder's function blocks in a tag of its own, `<seed:tool_call>...</seed:tool_call>`."""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import TagStyle, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_STYLE = TagStyle(
    function="<function",
    function_end="</function>",
    parameter="<parameter",
    parameter_end="</parameter>",
    value_ends=("\n<parameter=", "</function>\n</seed:tool_call>"),
    outer_ends=("</seed:tool_call>",),
)


class SeedOss(ToolFormat):
    name = "seed_oss"
    aliases = ("seed",)
    openers = ("<seed:tool_call>",)
    markers = ("</seed:tool_call>",)
    needs_special_tokens = True
    signs = (Sign("<seed:tool_call>"), Sign(tokens=("<seed:tool_call>",)))
    envelope = Envelope(
        begin="<seed:tool_call>\n<function=",
        middle=">\n",
        end="</function>\n</seed:tool_call>",
        separator="\n",
        style="tags",
        parameter_begin="<parameter=",
        parameter_middle=">",
        parameter_end="</parameter>\n",
        triggers=("<seed:tool_call>",),
        special_tokens=("<seed:tool_call>", "</seed:tool_call>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_function_blocks(p, _STYLE)
        yield from p.read_close("</seed:tool_call>")


FORMAT = SeedOss()
