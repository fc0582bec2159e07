"""GLM 4.5 to 4.7 and Poolside's Laguna: the name, then pairs of key and value.

    <tool_call>get_weather
    <arg_key>city</arg_key>
    <arg_value>Paris</arg_value>
    </tool_call>

GLM 4.7 and Laguna write the same without the line breaks.
"""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_call_tag import TAG_OPENERS, read_tool_call_tag
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Glm(ToolFormat):
    name = "glm"
    aliases = ("glm4", "glm45", "glm46", "glm47", "glm4_moe", "glm47_moe", "poolside_v1", "poolside", "laguna")
    openers = TAG_OPENERS
    markers = ("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    needs_special_tokens = True
    signs = (Sign("<tool_call>", "<arg_key>"), Sign(tokens=("<tool_call>", "<arg_key>")))
    envelope = Envelope(
        begin="<tool_call>",
        middle="\n",
        end="</tool_call>",
        separator="\n",
        style="tags",
        parameter_begin="<arg_key>",
        parameter_middle="</arg_key>\n<arg_value>",
        parameter_end="</arg_value>\n",
        triggers=("<tool_call>",),
        special_tokens=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_tool_call_tag(p)


FORMAT = Glm()
