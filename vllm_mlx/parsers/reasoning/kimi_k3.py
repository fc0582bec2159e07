"""Kimi K3: `<|open|>think<|sep|>...<|close|>think<|sep|>`, and tags around the answer that are no text."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="kimi_k3",
    aliases=("xtml",),
    pairs=(("<|open|>think<|sep|>", "<|close|>think<|sep|>"),),
    dropped=("<|open|>response<|sep|>", "<|close|>response<|sep|>", "<|close|>message<|sep|>", "<|end_of_msg|>"),
    is_anywhere=True,
    signs=(Sign("<|open|>", "<|sep|>", "<|close|>"), Sign(tokens=("<|open|>", "<|sep|>", "<|close|>"))),
)
