"""Seed-OSS: `<seed:think>...</seed:think>`. Its remarks on the budget it has used stay in the reasoning."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="seed_oss",
    aliases=("seed",),
    pairs=(("<seed:think>", "</seed:think>"),),
    is_anywhere=True,
    signs=(Sign("<seed:think>"), Sign(tokens=("<seed:think>",))),
)
