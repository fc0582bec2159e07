"""Kimi: `◁think▷...◁/think▷` (Kimi-VL Thinking, K1.5), `<think>` (K2 Thinking)."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="kimi",
    aliases=("kimi_k2", "moonshot"),
    pairs=(("<think>", "</think>"), ("◁think▷", "◁/think▷")),
    signs=(Sign("◁think▷"), Sign(tokens=("◁think▷", "◁/think▷"))),
)
