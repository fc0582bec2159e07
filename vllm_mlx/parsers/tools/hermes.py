"""Hermes and Qwen: a JSON object in `<tool_call>` tags (NousResearch Hermes 2/3, Qwen 2.5, Qwen 3).

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Paris"}}
    </tool_call>

Other bodies seen between these tags are read too (see `tool_call_tag.py`), and so is a bare JSON call that opens the
answer, provided that it names a tool of the request.
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls, read_named_call
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_call_tag import TAG_OPENERS, read_tool_call_tag
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Hermes(ToolFormat):
    name = "hermes"
    aliases = ("qwen", "qwen3", "qwen2_5", "nous", "json_tools")
    openers = (*TAG_OPENERS, "[Calling tool:")
    markers = ("</tool_call>",)
    needs_special_tokens = True  # `<tool_call>` is a token of its own in Qwen's vocabulary
    signs = (Sign("<tool_call>"),)
    envelope = Envelope(
        begin='<tool_call>\n{"name": "',
        middle='", "arguments": ',
        end="}\n</tool_call>",
        separator="\n",
        triggers=("<tool_call>",),
        special_tokens=("<tool_call>", "</tool_call>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener in TAG_OPENERS:
            yield from read_tool_call_tag(p)
        else:
            yield from read_bracket_call(p)

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from read_bare_json_calls(p)


def read_bracket_call(p: ToolParser) -> Steps[None]:
    """`[Calling tool: NAME({...})]`, which Qwen copies from histories that were rendered so."""
    name, _ = yield from p.collect_until("(", limit=200)
    yield from read_named_call(p, name, empty_before=(")",))
    yield from p.read_close(")]", ")")


FORMAT = Hermes()
