"""Mistral's first form, a JSON array behind `[TOOL_CALLS]`: read like `mistral`, but written so under a grammar."""

from __future__ import annotations

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope
from vllm_mlx.parsers.tools.mistral import Mistral


class MistralJson(Mistral):
    name = "mistral_json"
    aliases = ("mistral_v3", "mistral_v2")
    signs = (Sign("[TOOL_CALLS]"), Sign(tokens=("[TOOL_CALLS]",)))
    envelope = Envelope(
        open="[TOOL_CALLS][",
        begin='{"name": "',
        middle='", "arguments": ',
        end="}",
        separator=", ",
        close="]",
        triggers=("[TOOL_CALLS]",),
        special_tokens=("[TOOL_CALLS]",),
    )


FORMAT = MistralJson()
