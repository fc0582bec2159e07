"""Salesforce xLAM: a JSON array of calls, bare or fenced, at the start of the answer or of a line; also in markers.

[{"name": "get_weather", "arguments": {"city": "Paris"}}]
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls, read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_call_tag import TAG_OPENERS, read_tool_call_tag
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Xlam(ToolFormat):
    name = "xlam"
    aliases = ()
    openers = ("\n[", "\n{", "```json", "```\n[", "[TOOL_CALLS]", *TAG_OPENERS)
    markers = ("</tool_call>",)
    signs = (Sign("single JSON array", "tool_call_name"),)
    envelope = Envelope(open="[", begin='{"name": "', middle='", "arguments": ', end="}", separator=", ", close="]")

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from read_bare_json_calls(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener in TAG_OPENERS:
            yield from read_tool_call_tag(p)
        elif opener == "[TOOL_CALLS]":
            yield from read_json_calls(p)
        else:
            p.unread(opener)
            yield from read_bare_json_calls(p)


FORMAT = Xlam()
