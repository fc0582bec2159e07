"""Computes prompt chunks, alone or in packs, into the caches that their sequences have while they are prefilled.

Nothing is sampled here and no logits are computed, but for prompt logprobs. Which chunks share a forward is decided in
`packing.py`; how their rows stand side by side is `kv_pack.py`'s. MLX thread only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

import mlx.core as mx

from vllm_mlx.engine.guessing import Guessing
from vllm_mlx.engine.kv_cache import Layout, RowCache
from vllm_mlx.engine.kv_pack import packed_entries
from vllm_mlx.engine.logits import logprobs_at
from vllm_mlx.engine.media_cache import MediaCache
from vllm_mlx.engine.packing import pack_chunks
from vllm_mlx.engine.seat import Seat
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.step import Chunk
from vllm_mlx.models.base import Features, LanguageModel

log = logging.getLogger(__name__)


class Prefill:
    """`media` keeps what encoders made, by content; a head that guesses is shown what the model computed."""

    def __init__(
        self, model: LanguageModel, layout: Layout, media: MediaCache[Features], guessing: Guessing
    ) -> None:
        self._model = model
        self._layout = layout
        self._media = media
        self._guessing = guessing
        self._num_encoded = 0
        self._num_packed = 0

    def can_pack(self) -> bool:
        """Trace, without evaluating, a pack of a first and a later chunk; a model that cannot do it goes without."""
        rows = [self._layout.new_row() for _ in range(2)]
        if any(kind is not None for kind in rows[0].groups):
            return False
        chunks = (Chunk("", 0, 3, is_last=False), Chunk("", 2, 4, is_last=False))
        tokens = [0] * 4
        try:
            self._model.prefill(mx.array([tokens[:2]], dtype=mx.int32), 0, rows[1].entries, None, {})
            self._forward([tokens, tokens], chunks, rows, [None, None])
        except Exception as error:  # whatever foreign model code does with caches it does not expect
            log.info("%s computes prompts one by one (%s)", self._model.profile.name, error)
            return False
        return True

    def compute(self, chunks: SequenceOf[Chunk], seats: Mapping[str, Seat], *, in_packs: bool) -> None:
        """Start all chunks of a step, each of another seat; returns at once where the device allows it. `in_packs`:
        short ones may share a forward."""
        alone: list[Chunk] = []
        together: list[Chunk] = []
        for chunk in chunks:
            can_share = in_packs and _can_be_packed(chunk, seats[chunk.request_id].sequence)
            (together if can_share else alone).append(chunk)
        for pack in [*((c,) for c in alone), *pack_chunks(together)]:
            own = [seats[chunk.request_id] for chunk in pack]
            self._compute_pack(pack, own) if len(pack) > 1 else self._compute_one(pack[0], own[0])

    def metrics(self) -> Mapping[str, object]:
        return {
            "num_packed_chunks": self._num_packed,
            "media_cache_bytes": self._media.nbytes,
            "num_encoder_runs": self._num_encoded,
        }

    def _compute_one(self, chunk: Chunk, seat: Seat) -> None:
        """One chunk by itself: what packs must agree with."""
        assert seat.cache is not None, "a sequence in the decode batch has nothing to prefill"
        tokens = mx.array(seat.sequence.tokens[chunk.start : chunk.end], dtype=mx.int32)[None]
        features = self._features(seat.sequence, chunk.start, chunk.end)
        self._model.adapters.use([seat.sequence.request.adapter])
        logits = self._model.prefill(tokens, chunk.start, seat.cache.entries, seat.state, features)
        num_logprobs = seat.sequence.request.num_prompt_logprobs
        if num_logprobs is not None:
            following = seat.sequence.tokens[chunk.start + 1 : chunk.end + 1]
            arrays = logprobs_at(logits[0], mx.array(following, dtype=mx.uint32), num_logprobs)
            seat.prompt_logprobs.append(arrays)
            mx.async_eval(arrays)
        if (head := self._guessing.head) is not None:
            self._guessing.saw(seat.sequence, chunk.start, head.states[0])
        mx.async_eval(seat.cache.state)
        _keep_state(seat, chunk)

    def _compute_pack(self, chunks: SequenceOf[Chunk], seats: SequenceOf[Seat]) -> None:
        """Several sequences' chunks in one forward; each row's keys and values end up in its own cache."""
        self._num_packed += len(chunks)
        caches = [seat.cache for seat in seats if seat.cache is not None]
        names = [seat.sequence.request.adapter for seat in seats]
        self._model.adapters.use([n for n, c in zip(names, chunks, strict=True) for _ in range(c.end - c.start)])
        self._forward([seat.sequence.tokens for seat in seats], chunks, caches, [seat.state for seat in seats])
        if (head := self._guessing.head) is not None:
            first = 0
            for seat, chunk in zip(seats, chunks, strict=True):
                last = first + chunk.end - chunk.start
                self._guessing.saw(seat.sequence, chunk.start, head.states[first:last, 0])
                first = last
        mx.async_eval([cache.state for cache in caches])
        for seat, chunk in zip(seats, chunks, strict=True):
            _keep_state(seat, chunk)

    def _forward(
        self,
        tokens: SequenceOf[SequenceOf[int]],
        chunks: SequenceOf[Chunk],
        caches: SequenceOf[RowCache],
        states: SequenceOf[Any | None],
    ) -> None:
        counts = [c.end - c.start for c in chunks]
        entries = packed_entries(caches, [c.start for c in chunks], counts)
        flat = [t for own, c in zip(tokens, chunks, strict=True) for t in own[c.start : c.end]]
        positions = [position for c in chunks for position in range(c.start, c.end)]
        flat_states = [state for state, count in zip(states, counts, strict=True) for _ in range(count)]
        self._model.decode(mx.array(flat, dtype=mx.int32)[:, None], positions, entries, flat_states)

    def _features(self, sequence: Sequence, start: int, end: int) -> dict[int, Features]:
        """Encoder outputs of the spans that overlap [start, end), computed once per content."""
        found = {}
        for index, span in enumerate(sequence.request.prompt.media):
            if span.start < end and start < span.end:
                features = self._media.get(span.content_hash)
                if features is None:
                    features = self._model.encode(span)
                    self._num_encoded += 1
                    mx.eval(features.arrays())
                    self._media.put(span.content_hash, features)
                found[index] = features
        return found


def _can_be_packed(chunk: Chunk, sequence: Sequence) -> bool:
    request = sequence.request
    has_media = any(s.start < chunk.end and chunk.start < s.end for s in request.prompt.media)
    return request.num_prompt_logprobs is None and not has_media


def _keep_state(seat: Seat, chunk: Chunk) -> None:
    if chunk.keep_state:
        assert seat.cache is not None
        mx.async_eval(seat.keep(seat.cache.checkpoint(chunk.end)))
