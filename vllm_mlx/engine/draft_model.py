"""A small model that guesses for the served one. MLX thread only.

It keeps a cache of its own for each row that it guesses for. What it guessed wrongly is trimmed off, so only models
whose layers keep every token can draft. Its guesses are greedy: the served model's own sampling decides what is kept.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import mlx.core as mx

from vllm_mlx.engine.kv_cache import Layout, RowCache, measure_footprint
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.errors import SettingsError
from vllm_mlx.models.base import LanguageModel

# Prompt tokens it computes in one step. A long prompt is caught up with over several, so that no neighbour waits.
CATCH_UP_TOKENS = 512


@dataclass
class _DraftRow:
    """`computed` are the tokens whose keys `cache` holds."""

    cache: RowCache
    computed: list[int] = field(default_factory=list)


class DraftModel:
    """`speculative.DraftSource` over a model with the served one's vocabulary."""

    wants_states = False

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._layout = Layout(model.make_cache)
        if not self._layout.new_row().is_sliceable:
            raise SettingsError(
                f"--draft-model {model.profile.name} cannot draft: its layers keep a state that cannot be taken back "
                "after a wrong guess. Choose a model with plain attention."
            )
        self._footprint = measure_footprint(
            self._layout, lambda tokens, entries: model.prefill(tokens, 0, entries, None, {})
        )
        self._rows: dict[str, _DraftRow] = {}

    def saw(self, row: Sequence, start: int, states: object) -> None:
        """It computes everything itself."""

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes its cache of a row of this many tokens holds."""
        return self._footprint.bytes_for(num_tokens)

    def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
        """The likeliest `limit` tokens behind the row's; none while the prompt is not caught up with, or with media."""
        if row.request.prompt.media:
            return ()
        own = self._rows.get(row.id)
        if own is None:
            own = self._rows[row.id] = _DraftRow(self._layout.new_row())
        self._trim(own, row.tokens)
        if not self._catch_up(own, row.tokens):
            return ()
        token = mx.array(row.tokens[-1:], dtype=mx.int32)
        guesses = []
        for i in range(limit):
            logits = self._model.decode(token[:, None], [len(row.tokens) - 1 + i], own.cache.entries, [None])
            token = mx.argmax(logits, axis=-1).astype(mx.int32)
            guesses.append(token)
        drafted = [int(t) for t in mx.concatenate(guesses).tolist()]
        mx.async_eval(own.cache.state)
        own.computed += [row.tokens[-1], *drafted[:-1]]
        return tuple(drafted)

    def close(self, request_id: str) -> None:
        self._rows.pop(request_id, None)

    @staticmethod
    def _trim(own: _DraftRow, tokens: SequenceOf[int]) -> None:
        """Forget what turned out otherwise; the last token is always computed anew."""
        limit = min(len(own.computed), len(tokens) - 1)
        same = next((i for i in range(limit) if own.computed[i] != tokens[i]), limit)
        own.cache.trim(same)
        del own.computed[same:]

    def _catch_up(self, own: _DraftRow, tokens: SequenceOf[int]) -> bool:
        """Compute what came since; False if there is more than one step's worth."""
        start = len(own.computed)
        end = min(len(tokens) - 1, start + CATCH_UP_TOKENS)
        if end > start:
            chunk = mx.array(tokens[start:end], dtype=mx.int32)[None]
            self._model.prefill(chunk, start, own.cache.entries, None, {})
            mx.async_eval(own.cache.state)
            own.computed += tokens[start:end]
        return end == len(tokens) - 1
