"""LongCat: `<longcat_think>...</longcat_think>`."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="longcat",
    pairs=(("<longcat_think>", "</longcat_think>"),),
    is_anywhere=True,
    signs=(Sign("<longcat_think>"), Sign(tokens=("<longcat_think>",))),
)
