"""Magistral and Ministral 3 Reasoning: `[THINK]...[/THINK]`; the first Magistral wrote `<think>` instead."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="mistral",
    aliases=("magistral", "ministral"),
    pairs=(("[THINK]", "[/THINK]"), ("<think>", "</think>")),
    is_anywhere=True,
    signs=(Sign("[THINK]"), Sign("[/THINK]"), Sign(tokens=("[THINK]", "[/THINK]"))),
)
