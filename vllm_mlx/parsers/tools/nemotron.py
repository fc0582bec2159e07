"""NVIDIA Nemotron: `<TOOLCALL>[{...}]</TOOLCALL>` (Nano v2, Llama-Nemotron), and Qwen's XML (Nemotron 3)."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolParser
from vllm_mlx.parsers.tools.qwen_xml import QwenXml


class Nemotron(QwenXml):
    name = "nemotron"
    aliases = ("nemotron3", "nemotron_nano", "llama_nemotron")
    openers = (*QwenXml.openers, "<TOOLCALL>")
    markers = (*QwenXml.markers, "</TOOLCALL>")
    signs = (Sign("<TOOLCALL>"),)
    envelope = Envelope(
        open="<TOOLCALL>[",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        close="]</TOOLCALL>",
        triggers=("<TOOLCALL>",),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "<TOOLCALL>":
            yield from read_json_calls(p)
            yield from p.read_close("</TOOLCALL>")
        else:
            yield from super().read(p, opener)


FORMAT = Nemotron()
