"""A model that computes all that another one computes, and then says what a script says. MLX thread.

For measuring what guessing ahead brings on real text without a model that could write it: a step costs what it costs,
and the next token at each place is the script's, whatever was guessed there. All rows follow one script, and their
prompts are its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

CERTAIN = 1e4


class ScriptedModel:
    """Everything but `decode` is the inner model's. `script`: prompt and answer, as token ids."""

    def __init__(self, inner: Any, script: Sequence[int] = ()) -> None:
        self._inner = inner
        self.script = list(script)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def decode(self, tokens: mx.array, positions: Sequence[int], entries: Any, states: Any) -> mx.array:
        """Logits [T, V]: at the place of position p, `script[p + 1]` is certain."""
        logits = self._inner.decode(tokens, positions, entries, states)
        if not self.script:
            return mx.array(logits)  # the runner finds out what the model can do
        last = len(self.script) - 1
        following = mx.array([self.script[min(p + 1, last)] for p in positions], dtype=mx.int32)
        is_next = mx.arange(logits.shape[-1])[None] == following[:, None]
        return mx.where(is_next, mx.array(CERTAIN, logits.dtype), logits)
