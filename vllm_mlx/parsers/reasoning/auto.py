"""Any marker in use, for a model whose template does not tell. Plain-word formats and Harmony must be asked for."""

from __future__ import annotations

from vllm_mlx.parsers.reasoning import command_r, gemma4, kimi, longcat, mistral, seed_oss, think_tags
from vllm_mlx.parsers.reasoning_parser import ReasoningFormat

_FORMATS = (
    think_tags.FORMAT,
    kimi.FORMAT,
    mistral.FORMAT,
    gemma4.FORMAT,
    seed_oss.FORMAT,
    longcat.FORMAT,
    command_r.FORMAT,
)

FORMAT = ReasoningFormat(
    name="auto",
    aliases=("generic",),
    pairs=tuple(dict.fromkeys(pair for format in _FORMATS for pair in format.pairs)),
    dropped=tuple(dict.fromkeys(text for format in _FORMATS for text in format.dropped)),
    forced_end=think_tags.FORMAT.forced_end,
)
