"""Guesses by the served model's own head for the token after next. MLX thread only.

The runner shows it the state behind every token that was computed and kept; a pair of such a state and the token that
followed is one step of the head, whose cache holds all pairs of a row. From its own guess it can go on a little. What
was guessed ahead is trimmed off the cache again: only what the row really said stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from vllm_mlx.engine.kv_cache import Layout, RowCache, measure_footprint
from vllm_mlx.engine.sequence import Sequence

# Further on, a head that was trained for one token is rarely right.
MAX_CHAIN = 4
# States kept while nobody asks for guesses; with more than these the row starts anew.
MAX_WAITING = 64


class HeadModel(Protocol):
    """What is asked of a model with a head; `models.mtp.MtpTextModel` fits."""

    @property
    def head(self) -> Any: ...

    def embed(self, tokens: mx.array) -> mx.array: ...

    def logits(self, states: mx.array) -> mx.array: ...

    def make_head_cache(self) -> list[Any]: ...


@dataclass
class _HeadRow:
    """`cache` holds the pairs of positions [first, done), and `last` came out of them; `states` are of [done, end)."""

    cache: RowCache
    first: int
    done: int
    states: list[mx.array] = field(default_factory=list)
    last: tuple[mx.array, mx.array] | None = None

    @property
    def end(self) -> int:
        return self.done + sum(part.shape[0] for part in self.states)


class MtpDraft:
    """`speculative.DraftSource` over the served model's head."""

    wants_states = True

    def __init__(self, model: HeadModel) -> None:
        self._model = model
        self._layout = Layout(model.make_head_cache)
        self._footprint = measure_footprint(self._layout, self._trace)
        self._rows: dict[str, _HeadRow] = {}

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes the head's cache of a row of this many tokens holds."""
        return self._footprint.bytes_for(num_tokens)

    def saw(self, row: Sequence, start: int, states: mx.array) -> None:
        """The row's tokens [start, start + n) are computed and stay; `states` [n, D] stand behind them."""
        if row.request.prompt.media:
            return
        own = self._rows.get(row.id)
        if own is None or own.end != start or own.end - own.done > MAX_WAITING:
            own = self._rows[row.id] = _HeadRow(self._layout.new_row(), start, start)
        own.states.append(states)
        if start + states.shape[0] < row.num_prompt_tokens:  # a chunk of the prompt: what follows is known
            self._advance(own, row, own.end)
            mx.async_eval(own.last, own.cache.state)

    def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
        """The likeliest tokens behind the row's; none where its states were not seen."""
        own = self._rows.get(row.id)
        position = len(row.tokens) - 1  # of the last token, which is known and not computed
        if own is None or own.end != position:
            return ()
        if own.states:
            self._advance(own, row, position)
        if own.last is None:
            return ()
        out, state = own.last
        guesses = []
        for _ in range(min(limit, MAX_CHAIN)):
            guesses.append(mx.argmax(self._model.logits(out), axis=-1).astype(mx.int32))
            if len(guesses) < min(limit, MAX_CHAIN):
                out, state = self._model.head(state, self._model.embed(guesses[-1]), own.cache.entries[0])
        drafted = tuple(int(token) for token in mx.concatenate(guesses, axis=1)[0].tolist())
        mx.async_eval(own.cache.state)
        own.cache.trim(own.done - own.first)
        return drafted

    def close(self, request_id: str) -> None:
        self._rows.pop(request_id, None)

    def _advance(self, own: _HeadRow, row: Sequence, end: int) -> None:
        """Compute the pairs up to position `end`, all of whose states are here."""
        states = own.states[0] if len(own.states) == 1 else mx.concatenate(own.states)
        following = mx.array(row.tokens[own.done + 1 : end + 1], dtype=mx.int32)[None]
        out, state = self._model.head(states[None], self._model.embed(following), own.cache.entries[0])
        own.states, own.done, own.last = [], end, (out[:, -1:], state[:, -1:])

    def _trace(self, tokens: mx.array, entries: list[Any]) -> mx.array:
        embeddings = self._model.embed(tokens)
        out: mx.array = self._model.head(embeddings, embeddings, entries[0])[0]
        return out
