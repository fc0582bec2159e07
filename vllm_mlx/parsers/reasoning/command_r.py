"""Cohere Command A and R7B: thinking between tokens, and tokens around the answer that are no text."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="command_r",
    aliases=("cohere", "command_a", "cohere2"),
    pairs=(("<|START_THINKING|>", "<|END_THINKING|>"),),
    dropped=("<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|START_TEXT|>", "<|END_TEXT|>"),
    is_anywhere=True,
    signs=(Sign("<|START_THINKING|>"), Sign("<|START_RESPONSE|>"), Sign(tokens=("<|START_THINKING|>",))),
)
