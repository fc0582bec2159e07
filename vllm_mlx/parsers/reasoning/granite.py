"""Granite 3.2 and 3.3 in plain words: "Here is my thought process: ... Here is my response: ...".

Granite 3.3's later templates use `<think>` and `<response>` tags; these are read too.
"""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="granite",
    aliases=("granite3",),
    pairs=(
        ("Here is my thought process:", "Here is my response:"),
        ("Here's my thought process:", "Here's my response:"),
        ("<think>", "</think>"),
    ),
    dropped=("<response>", "</response>"),
    forced_end="\n\nHere is my response:\n\n",
    needs_special_tokens=False,
    signs=(Sign("Here is my thought process:"), Sign("<think></think>", "<response></response>")),
)
