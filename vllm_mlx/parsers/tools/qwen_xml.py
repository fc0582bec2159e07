"""Qwen3-Coder's XML, also used by Qwen3.5, Nemotron 3, Step 3.5 and Trinity.

    <tool_call>
    <function=get_weather>
    <parameter=city>
    Paris
    </parameter>
    </function>
    </tool_call>

Models at times forget the outer tag, so a function block opens a call too.
"""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import QWEN, read_function_blocks
from vllm_mlx.parsers.tool_call_tag import TAG_OPENERS, read_tool_call_tag
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class QwenXml(ToolFormat):
    name = "qwen_xml"
    aliases: tuple[str, ...] = (
        "qwen3_coder",
        "qwen3_xml",
        "qwen3_5",
        "step",
        "step3p5",
        "nemotron_v3",
        "trinity",
        "mimo",
    )
    openers: tuple[str, ...] = (*TAG_OPENERS, "<function=")
    markers: tuple[str, ...] = ("</tool_call>",)
    needs_special_tokens = True
    signs: tuple[Sign, ...] = (Sign("<tool_call>", "<function="),)
    envelope = Envelope(
        begin="<tool_call>\n<function=",
        middle=">\n",
        end="</function>\n</tool_call>",
        separator="\n",
        style="tags",
        parameter_begin="<parameter=",
        parameter_middle=">\n",
        parameter_end="\n</parameter>\n",
        triggers=("<tool_call>",),
        special_tokens=("<tool_call>", "</tool_call>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener in TAG_OPENERS:
            yield from read_tool_call_tag(p)
        else:
            p.unread(opener)
            yield from read_function_blocks(p, QWEN)
            yield from p.skip_space()
            yield from p.accept("</tool_call>")
            p.settle()


FORMAT = QwenXml()
