"""Harmony (gpt-oss): reasoning is one of its channels; one machine reads the whole answer (`parsers/harmony.py`)."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="harmony",
    aliases=("gpt_oss", "gptoss", "openai_gptoss", "openai"),
    pairs=(("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),),
    thought_end="<|end|>",
    forced_end="<|end|><|start|>assistant<|channel|>final<|message|>",
    is_anywhere=True,
    signs=(
        Sign("<|channel|>analysis"),
        Sign("<|channel|>", "<|message|>"),
        Sign(tokens=("<|channel|>", "<|message|>")),
    ),
)
