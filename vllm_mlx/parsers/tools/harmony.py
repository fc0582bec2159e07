"""Harmony (gpt-oss): calls are messages to a function; one machine reads the whole answer (`parsers/harmony.py`)."""

from __future__ import annotations

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat

_MARKERS = ("<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>")


class Harmony(ToolFormat):
    name = "harmony"
    aliases = ("gpt_oss", "gptoss", "openai")
    markers = _MARKERS
    needs_special_tokens = True
    signs = (
        Sign("<|channel|>commentary"),
        Sign("<|channel|>", "<|message|>"),
        Sign(tokens=("<|channel|>", "<|call|>")),
    )
    envelope = Envelope(
        begin="<|channel|>commentary to=functions.",
        middle=" <|constrain|>json<|message|>",
        end="<|call|>",
        separator="<|start|>assistant",
        triggers=("<|channel|>commentary to=",),
        special_tokens=_MARKERS,
        reasoning_end="<|end|><|start|>assistant",
    )


FORMAT = Harmony()
