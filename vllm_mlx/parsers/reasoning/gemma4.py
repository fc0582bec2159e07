"""Gemma 4: a channel named thought, `<|channel>thought\\n...<channel|>`."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="gemma4",
    aliases=("gemma_4",),
    pairs=(("<|channel>thought", "<channel|>"),),
    forced_end="\n<channel|>",
    is_anywhere=True,
    signs=(Sign("<|channel>thought"), Sign("<|channel>"), Sign(tokens=("<|channel>", "<channel|>"))),
)
