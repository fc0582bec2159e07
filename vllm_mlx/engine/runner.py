"""Executes plans on the device: prompt chunks into a sequence's own cache, decode steps for all rows at once.

A prompt is prefilled up to its last token, which the first decode step computes: so sampling happens in one place only,
and no logits are ever computed for a prompt. `launch` starts the work and returns; `collect` waits for the tokens. MLX
thread only.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_mlx.engine.constraint import Guide, prepare_guides
from vllm_mlx.engine.decode_batch import DecodeBatch
from vllm_mlx.engine.drafted import sampling_rows, with_drafts
from vllm_mlx.engine.invariance import Invariance, choose
from vllm_mlx.engine.kv_batch import BatchCache, grouped_entries
from vllm_mlx.engine.kv_cache import (
    Footprint,
    KVSegment,
    Layout,
    Quantization,
    RecurrentRow,
    RowCache,
    StateCheckpoint,
    WindowRow,
    capacity_for,
    measure_footprint,
)
from vllm_mlx.engine.kv_pack import packed_entries
from vllm_mlx.engine.logits import logprobs_at
from vllm_mlx.engine.media_cache import MediaCache
from vllm_mlx.engine.packing import pack_chunks
from vllm_mlx.engine.prefix_cache import Lease
from vllm_mlx.engine.sampler import BatchSampler, SampledBatch, SamplingRow, read_logprobs
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import Speculator, StepClock, num_kept_of
from vllm_mlx.engine.step import Chunk, Sampled, StepPlan, StepResult, TokenLogprobs
from vllm_mlx.models.base import Features, LanguageModel

log = logging.getLogger(__name__)

NO_RING = 1 << 30
"""Where no layer has a window: rows may be drafted as far as anybody would."""


@dataclass(eq=False)
class Seat:
    """What the runner holds for one running sequence.

    `cache` is the sequence's own while it is prefilled, and None once it stands in the decode batch.
    `prompt_logprobs` are (chosen, top values, top ids) arrays of each chunk, when the request wants them.
    """

    sequence: Sequence
    cache: RowCache | None
    sampling: SamplingRow
    state: Any | None
    checkpoints: dict[int, StateCheckpoint] = field(default_factory=dict)
    prompt_logprobs: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)


@dataclass(frozen=True)
class LaunchedStep:
    """A step on its way: the seats it sampled for, in the order of its tokens.

    `drafts`, parallel to `seats`, are guesses of the tokens behind each one's next; empty when nobody has any.
    `states` [T, D] stand behind the step's tokens, where a head guesses from them; each seat's first is at `positions`.
    """

    plan: StepPlan
    seats: tuple[Seat, ...]
    sampled: SampledBatch | None
    allows_overlap: bool
    drafts: tuple[tuple[int, ...], ...] = ()
    states: mx.array | None = None
    positions: tuple[int, ...] = ()


class ModelRunner:
    """One model, its decode batch and its sampler.

    Models whose caches cannot stand side by side are decoded row by row, all rows within one step. `checkpoint_step`:
    every so many tokens of decoding, the state of layers that cannot be sliced is kept (0 for never). `slack_bytes`: so
    much memory may be wasted on padding, whatever the ratio. `is_invariant`: no answer may depend on what is computed
    beside it; `invariance` says what that takes here. `samples`: False on ranks that only compute their part.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        quantization: Quantization | None = None,
        media_cache: MediaCache[Features] | None = None,
        checkpoint_step: int = 0,
        slack_bytes: int = 16 << 20,
        is_invariant: bool = False,
        samples: bool = True,
        seed: int | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.model = model
        self._samples = samples
        self.layout = Layout(model.make_cache, quantization)
        self.footprint: Footprint = measure_footprint(
            self.layout, lambda tokens, entries: model.prefill(tokens, 0, entries, None, {})
        )
        example = self._example = self.layout.new_row()
        self._slack_tokens = slack_bytes // max(1, self.footprint.per_token)
        self.needs_checkpoint = not example.is_sliceable
        self.is_batched = example.is_batchable and model.profile.runs_batched
        self.can_group = self.is_batched and model.can_group and self._decodes_in_groups()
        self.invariance = Invariance()
        if is_invariant:
            self.invariance = choose(model, self.layout, can_batch=self.is_batched, can_group=self.can_group)
            self.is_batched = self.is_batched and self.invariance.num_rows != 1
        # A pack pads its prompts to the longest: other shapes, in other company.
        self.can_pack = self.can_group and not is_invariant and self._prefills_in_packs()
        self.checkpoint_step = checkpoint_step
        # Recurrent states cannot be taken back after a wrong guess.
        has_states = any(isinstance(row, RecurrentRow) for row in example.rows)
        self.can_speculate = self.can_group and not is_invariant and not has_states
        self.speculator = speculator if self.can_speculate else None
        # A model with a head, whose `states` are those of its last call; None where nobody guesses from them.
        self._headed: Any = model if self.speculator is not None and self.speculator.wants_states else None
        self._states_of_step: mx.array | None = None
        self._ring = min((row.max_size for row in example.rows if isinstance(row, WindowRow)), default=None)
        self._clock = StepClock()
        self._media = media_cache if media_cache is not None else MediaCache(budget_bytes=256 << 20)
        self._num_encoded = 0
        self._seats: dict[str, Seat] = {}
        self._batch: DecodeBatch | None = None
        self._num_packed = 0
        self._sampler = BatchSampler()
        self._last: LaunchedStep | None = None
        self._seeds = itertools.count(seed if seed is not None else int.from_bytes(np.random.bytes(6), "little"))

    def _decodes_in_groups(self) -> bool:
        """Trace, without evaluating, a decode step of two groups; a model that cannot do it goes without."""
        caches = []
        try:
            for length in (2, 3):
                row = self.layout.new_row()
                self.model.prefill(mx.zeros((1, length), dtype=mx.int32), 0, row.entries, None, {})
                cache = BatchCache(row)
                cache.adopt(row, length + 1)
                cache.begin([length])
                caches.append(cache)
            tokens = mx.zeros((2, 1), dtype=mx.int32)
            logits = self.model.decode(tokens, [2, 3], grouped_entries(caches), [None, None])
        except Exception as error:  # whatever foreign model code does with caches it does not expect
            log.info("%s pads rows to the longest: it cannot be decoded in groups (%s)", self.model.profile.name, error)
            self.model.ungroup()
            return False
        return logits.shape[0] == 2

    def _prefills_in_packs(self) -> bool:
        """Trace, without evaluating, a pack of a first and a later chunk."""
        if any(kind is not None for kind in self._example.groups):
            return False
        rows = [self.layout.new_row() for _ in range(2)]
        chunks = (Chunk("", 0, 3, is_last=False), Chunk("", 2, 4, is_last=False))
        tokens = [0] * 4
        try:
            self.model.prefill(mx.array([tokens[:2]], dtype=mx.int32), 0, rows[1].entries, None, {})
            self._forward_packed([tokens, tokens], chunks, rows, [None, None])
        except Exception as error:  # whatever foreign model code does with caches it does not expect
            log.info("%s computes prompts one by one (%s)", self.model.profile.name, error)
            return False
        return True

    # ── KV, as the scheduler asks for it ────────────────────────────────────────────────────────────────────────

    def bytes_for(self, num_tokens: int) -> int:
        num_bytes = self.footprint.bytes_for(num_tokens)
        return num_bytes + self.speculator.bytes_for(num_tokens) if self.speculator is not None else num_bytes

    def open(self, sequence: Sequence, lease: Lease | None) -> None:
        cache = self.layout.new_row()
        cache.make_room(capacity_for(len(sequence.tokens)))
        if lease is not None and lease.num_tokens:
            cache.load(lease)
        request = sequence.request
        completion = sequence.tokens[sequence.num_prompt_tokens :]
        sampling = SamplingRow(
            request.sampling,
            vocab_size=self.model.profile.vocab_size,
            seed=next(self._seeds),
            prompt_ids=request.prompt.token_ids,
            completion_ids=completion,
            stop_token_ids=request.stop_token_ids,
            guide=Guide.of(request, completion),
        )
        self._seats[sequence.id] = Seat(sequence, cache, sampling, self.model.prompt_state(request.prompt))

    def segment(self, sequence: Sequence, start: int, end: int) -> KVSegment:
        seat = self._seats[sequence.id]
        if seat.cache is not None:
            segment = seat.cache.segment(start, end)
        else:
            assert self._batch is not None
            segment = self._batch.segment(sequence.id, start, end)
        mx.async_eval(segment.arrays())
        return segment

    def checkpoint(self, sequence: Sequence, position: int) -> StateCheckpoint | None:
        return self._seats[sequence.id].checkpoints.get(position)

    def close(self, sequence: Sequence) -> None:
        seat = self._seats.pop(sequence.id)
        if self.speculator is not None:
            self.speculator.close(sequence.id)
        if seat.cache is None and self._batch is not None:
            self._batch.leave(sequence.id)
            if not len(self._batch):
                self._batch = None
        if not self._seats:
            self._clock.stop()
            self._last = None  # it holds arrays, and nobody is left who could have a token pending in it

    def reset(self) -> None:
        """After a failed step nothing on the device is trusted; the scheduler has closed all rows."""
        self._batch = None
        self._last = None
        self._sampler = BatchSampler()

    # ── executing ───────────────────────────────────────────────────────────────────────────────────────────────

    def draft(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> tuple[tuple[int, ...], ...]:
        """The first half of `launch`, once a step: put new rows into the batch, and guess for each of `plan.decode`
        what follows its next token; empty when nothing is guessed at all."""
        seats = tuple(self._seats[request_id] for request_id in plan.decode)
        self._join(seats)
        return self._drafts(seats, plan) if plan.draft_limits else ()

    def launch(
        self,
        plan: StepPlan,
        sequences: Mapping[str, Sequence],
        drafts: tuple[tuple[int, ...], ...] | None = None,
    ) -> LaunchedStep:
        """Start the step's decode, then its chunks; returns at once where the device allows it. `drafts` are given
        where `draft` was called before, here or on the rank that decides."""
        seats = tuple(self._seats[request_id] for request_id in plan.decode)
        if drafts is None:
            drafts = self.draft(plan, sequences)
        sampled = self._decode(seats, drafts) if seats else None
        alone = [c for c in plan.chunks if not self._can_be_packed(c)]
        together = [c for c in plan.chunks if self._can_be_packed(c)]
        for pack in [*((c,) for c in alone), *pack_chunks(together)]:
            self._prefill_pack(pack) if len(pack) > 1 else self._prefill(pack[0])
        overlap = not any(seat.sampling.needs_host_token for seat in seats)
        overlap = overlap and not any(drafts) and not self._expects_drafts(seats, plan)
        asking = tuple(seat for seat in seats if not seat.sequence.is_repeating)
        # Who repeats does so for --batch-invariant, where nobody guesses: then there are no states.
        states, self._states_of_step = self._states_of_step, None
        positions = tuple(seat.sequence.num_computed - 1 for seat in asking)
        self._last = LaunchedStep(plan, asking, sampled, overlap, drafts if any(drafts) else (), states, positions)
        return self._last

    def collect(self, launched: LaunchedStep) -> StepResult:
        """Wait for the step's tokens."""
        if launched.sampled is None:
            return StepResult()
        tokens = launched.sampled.collect()
        errors = launched.sampled.row_errors
        results, failures, first, num_kept = [], {}, 0, 0
        all_drafts = launched.drafts or ((),) * len(launched.seats)
        for seat, position, draft in zip(launched.seats, launched.positions, all_drafts, strict=True):
            last = first + len(draft)
            if (error := errors[first]) is not None:
                failures[seat.sequence.id] = error
            else:
                kept = num_kept_of(draft, [t for t, _ in tokens[first : last + 1]], errors[first : last + 1])
                if draft:
                    self._keep_drafts(seat, len(draft), kept)
                    num_kept += kept
                self._show(seat, position, launched.states, first, first + kept + 1)
                results.append(_sampled(seat, tokens[first : first + kept + 1]))
            first = last + 1
        elapsed_s = self._clock.lap(launched.plan)
        if self.speculator is not None and elapsed_s is not None:
            self.speculator.observe(len(tokens), len(launched.seats), num_kept, elapsed_s)
        return StepResult(tuple(results), failures)

    def metrics(self) -> Mapping[str, object]:
        batch = self._batch
        own = sum(a.nbytes for seat in self._seats.values() if seat.cache is not None for a in seat.cache.state)
        return {
            "batch_rows": batch.num_rows if batch else 0,
            "batch_groups": batch.num_groups if batch else 0,
            "kv_held_bytes": own + (batch.nbytes if batch else 0),
            "kv_waste_ratio": batch.waste_ratio if batch else 1.0,
            "num_packed_chunks": self._num_packed,
            "media_cache_bytes": self._media.nbytes,
            **({"batch_invariance": self.invariance.name} if self.invariance.is_promised else {}),
            "num_encoder_runs": self._num_encoded,
            **(self.speculator.metrics() if self.speculator is not None else {}),
        }

    # ── prompt chunks ────────────────────────────────────────────────────────────────────────────────────────

    def _prefill(self, chunk: Chunk) -> None:
        """One chunk by itself: what packs must agree with."""
        seat = self._seats[chunk.request_id]
        assert seat.cache is not None, "a sequence in the decode batch has nothing to prefill"
        tokens = mx.array(seat.sequence.tokens[chunk.start : chunk.end], dtype=mx.int32)[None]
        features = self._features(seat.sequence, chunk.start, chunk.end)
        self.model.adapters.use([seat.sequence.request.adapter])
        logits = self.model.prefill(tokens, chunk.start, seat.cache.entries, seat.state, features)
        num_logprobs = seat.sequence.request.num_prompt_logprobs
        if num_logprobs is not None:
            following = seat.sequence.tokens[chunk.start + 1 : chunk.end + 1]
            arrays = logprobs_at(logits[0], mx.array(following, dtype=mx.uint32), num_logprobs)
            seat.prompt_logprobs.append(arrays)
            mx.async_eval(arrays)
        if self._headed is not None:
            self._show(seat, chunk.start, self._headed.states[0], 0, chunk.end - chunk.start)
        mx.async_eval(seat.cache.state)
        self._keep_state(seat, chunk)

    def _can_be_packed(self, chunk: Chunk) -> bool:
        request = self._seats[chunk.request_id].sequence.request
        has_media = any(s.start < chunk.end and chunk.start < s.end for s in request.prompt.media)
        return self.can_pack and request.num_prompt_logprobs is None and not has_media

    def _prefill_pack(self, chunks: SequenceOf[Chunk]) -> None:
        """Several sequences' chunks in one forward; each row's keys and values end up in its own cache."""
        self._num_packed += len(chunks)
        seats = [self._seats[chunk.request_id] for chunk in chunks]
        caches = [seat.cache for seat in seats if seat.cache is not None]
        names = [seat.sequence.request.adapter for seat in seats]
        self.model.adapters.use([n for n, c in zip(names, chunks, strict=True) for _ in range(c.end - c.start)])
        self._forward_packed([seat.sequence.tokens for seat in seats], chunks, caches, [seat.state for seat in seats])
        if self._headed is not None:
            first = 0
            for seat, chunk in zip(seats, chunks, strict=True):
                last = first + chunk.end - chunk.start
                self._show(seat, chunk.start, self._headed.states[:, 0], first, last)
                first = last
        mx.async_eval([cache.state for cache in caches])
        for seat, chunk in zip(seats, chunks, strict=True):
            self._keep_state(seat, chunk)

    def _forward_packed(
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
        self.model.decode(mx.array(flat, dtype=mx.int32)[:, None], positions, entries, flat_states)

    def _keep_state(self, seat: Seat, chunk: Chunk) -> None:
        if chunk.keep_state:
            assert seat.cache is not None
            checkpoint = seat.checkpoints[chunk.end] = seat.cache.checkpoint(chunk.end)
            mx.async_eval(checkpoint.arrays())
            for old in sorted(seat.checkpoints)[:-2]:  # stored by now: a step is committed before the one after next
                del seat.checkpoints[old]

    def _features(self, sequence: Sequence, start: int, end: int) -> dict[int, Features]:
        """Encoder outputs of the spans that overlap [start, end), computed once per content."""
        found = {}
        for index, span in enumerate(sequence.request.prompt.media):
            if span.start < end and start < span.end:
                features = self._media.get(span.content_hash)
                if features is None:
                    features = self.model.encode(span)
                    self._num_encoded += 1
                    mx.eval(features.arrays())
                    self._media.put(span.content_hash, features)
                found[index] = features
        return found

    # ── speculation ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _drafts(self, seats: SequenceOf[Seat], plan: StepPlan) -> tuple[tuple[int, ...], ...]:
        """A guess for each seat, empty where there is none or where it could not be verified."""
        if self.speculator is None or self._batch is None:
            return ()
        drafts = []
        for seat, limit in zip(seats, plan.draft_limits, strict=True):
            draft: tuple[int, ...] = ()
            limit = min(limit, self._batch.draft_room(seat.sequence.id, self._ring))
            if limit and not seat.sampling.has_penalties and self._known_token(seat) is not None:
                draft = self.speculator.draft(seat.sequence, limit, len(seats))
                if draft and seat.sampling.guide is not None:
                    draft = draft[: seat.sampling.guide.num_draftable(draft)]
            drafts.append(draft)
        return tuple(drafts)

    def _expects_drafts(self, seats: SequenceOf[Seat], plan: StepPlan) -> bool:
        """Some row will have a guess for its next step, if its token is waited for before that is launched."""
        if self.speculator is None or self._batch is None or not plan.draft_limits:
            return False
        return any(
            self.speculator.expects(seat.sequence, len(seats))
            for seat in seats
            if not seat.sampling.has_penalties and self._batch.draft_room(seat.sequence.id, self._ring)
        )

    def _keep_drafts(self, seat: Seat, num_drafted: int, num_kept: int) -> None:
        assert self.speculator is not None
        self.speculator.verified(seat.sequence, num_drafted, num_kept)
        seat.sampling.num_completion += num_kept
        self.keep(seat.sequence.id, num_kept)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """So many of the row's drafts in the last step are its own tokens now; the others are written over."""
        if self._batch is not None:
            self._batch.keep(request_id, num_tokens)

    @property
    def most_draft(self) -> int:
        """Tokens that may be written and taken back in a row, as far as this rank's layers go; 0 for none."""
        if not self.can_speculate:
            return 0
        return self._ring if self._ring is not None else NO_RING

    def bound_drafts(self, num_tokens: int) -> None:
        """Other ranks' layers allow no more than this."""
        if num_tokens == 0:
            self.can_speculate, self.speculator = False, None
        elif num_tokens < NO_RING:
            self._ring = num_tokens

    def _show(self, seat: Seat, start: int, states: mx.array | None, first: int, last: int) -> None:
        """`states[first:last]` stand behind the seat's tokens from position `start` on."""
        is_here = self._seats.get(seat.sequence.id) is seat  # it may have ended while its step was on its way
        if self.speculator is not None and states is not None and is_here:
            self.speculator.saw(seat.sequence, start, states[first:last])

    # ── one decode step ─────────────────────────────────────────────────────────────────────────────────────────

    def _decode(self, seats: SequenceOf[Seat], drafts: SequenceOf[tuple[int, ...]] = ()) -> SampledBatch | None:
        if self.is_batched:
            logits = self._batched_logits(seats, drafts or ((),) * len(seats))
        else:
            logits = self._single_logits(seats)
        asking = [i for i, seat in enumerate(seats) if not seat.sequence.is_repeating]
        if not self._samples or not asking:
            mx.eval(logits, self._states(seats), self._keep_states(seats))
            return None
        if len(asking) < len(seats):  # never beside drafts: who guesses does not repeat
            everybody, seats = seats, [seats[i] for i in asking]
            logits = logits[mx.array(asking, dtype=mx.uint32)]
        else:
            everybody = seats
        guides = [seat.sampling.guide for seat in seats]
        if any(guide is not None for guide in guides):
            mx.async_eval(logits)  # the device computes while the host makes the masks
            prepare_guides(guides)
        rows = [seat.sampling for seat in seats]
        if any(drafts):
            rows = [row for own, draft in zip(rows, drafts, strict=True) for row in sampling_rows(own, draft)]
        sampled = self._sampler.sample(logits, rows)
        mx.async_eval(sampled.arrays(), self._states(everybody), self._keep_states(everybody))
        return sampled

    def _keep_states(self, seats: SequenceOf[Seat]) -> list[mx.array]:
        """At block boundaries, keep the state of layers that cannot be sliced, for when the sequence ends here."""
        if not self.needs_checkpoint or not self.checkpoint_step:
            return []
        kept: list[mx.array] = []
        for seat in seats:
            position = seat.sequence.num_computed
            if position % self.checkpoint_step:
                continue
            if seat.cache is not None:
                checkpoint = seat.cache.checkpoint(position)
            else:
                assert self._batch is not None
                checkpoint = self._batch.checkpoint(seat.sequence.id, position)
            seat.checkpoints[position] = checkpoint
            for old in sorted(seat.checkpoints)[:-2]:
                del seat.checkpoints[old]
            kept += checkpoint.arrays()
        return kept

    def _states(self, seats: SequenceOf[Seat]) -> list[mx.array]:
        """Caches written by this step. All are evaluated with it, or the graph of recurrent states would grow."""
        if self._batch is not None:
            return self._batch.state
        return [a for seat in seats if seat.cache is not None for a in seat.cache.state]

    def _join(self, seats: SequenceOf[Seat]) -> None:
        """Into the batch with rows that decode for the first time."""
        if not self.is_batched or not seats:
            return
        if self._batch is None:
            self._batch = DecodeBatch(
                self._example,
                can_group=self.can_group,
                slack_tokens=self._slack_tokens,
                is_apart=self.invariance.is_promised,
                num_rows=self.invariance.num_rows,
            )
        for seat in seats:
            if seat.cache is not None:
                self._batch.join(seat.sequence.id, seat.cache, seat.sequence.num_computed - 1)
                seat.cache = None
        self._batch.arrange()

    def _batched_logits(self, seats: SequenceOf[Seat], drafts: SequenceOf[tuple[int, ...]]) -> mx.array:
        """Logits [T, V] of one forward over all rows of the batch: for each seat its next token, then its drafts."""
        batch = self._batch
        assert batch is not None
        num_drafts = {seat.sequence.id: len(draft) for seat, draft in zip(seats, drafts, strict=True)}
        positions = batch.begin_step(list(num_drafts), num_drafts if any(drafts) else None)
        firsts = [batch.index(seat.sequence.id) for seat in seats]
        indices = [i for first, draft in zip(firsts, drafts, strict=True) for i in range(first, first + len(draft) + 1)]
        states: list[Any | None] = [None] * len(positions)
        adapters = [""] * len(positions)
        tokens = self._tokens(seats)
        if any(drafts):
            tokens = with_drafts(tokens, drafts)
        for seat, first, draft in zip(seats, firsts, drafts, strict=True):
            for i in range(first, first + len(draft) + 1):
                states[i] = seat.state
                adapters[i] = seat.sequence.request.adapter
        self.model.adapters.use(adapters)
        is_in_order = indices == list(range(len(positions)))
        if not is_in_order:
            places = np.zeros(len(positions), dtype=np.uint32)
            places[indices] = np.arange(len(indices), dtype=np.uint32)
            tokens = tokens[mx.array(places)]
        logits = self.model.decode(tokens[:, None], positions, batch.entries, states)
        if self._headed is not None:
            behind = self._headed.states[:, 0]
            self._states_of_step = behind if is_in_order else behind[mx.array(indices, dtype=mx.uint32)]
        return logits if is_in_order else logits[mx.array(indices, dtype=mx.uint32)]

    def _single_logits(self, seats: SequenceOf[Seat]) -> mx.array:
        """Logits of one forward per row, for caches that cannot stand side by side."""
        rows = []
        for seat in seats:
            assert seat.cache is not None
            tokens = self._tokens([seat])
            position = seat.sequence.num_computed - 1
            self.model.adapters.use([seat.sequence.request.adapter])
            rows.append(self.model.decode(tokens[:, None], [position], seat.cache.entries, [seat.state]))
        return rows[0] if len(rows) == 1 else mx.concatenate(rows, axis=0)

    def _tokens(self, seats: SequenceOf[Seat]) -> mx.array:
        """int32 [len(seats)]: each sequence's last token, from the host where known, else from the step in flight."""
        known = [self._known_token(seat) for seat in seats]
        if None not in known:
            return mx.array(known, dtype=mx.int32)
        last = self._last
        assert last is not None and last.sampled is not None, "a token is pending, but no step is in flight"
        places = {id(seat): i for i, seat in enumerate(last.seats)}
        if last.seats == tuple(seats):
            pending = last.sampled.tokens.astype(mx.int32)
        else:
            order = [places.get(id(seat), 0) for seat in seats]
            pending = last.sampled.tokens[mx.array(order, dtype=mx.uint32)].astype(mx.int32)
        if all(token is None for token in known):
            return pending
        is_known = mx.array([token is not None for token in known])
        return mx.where(is_known, mx.array([token or 0 for token in known], dtype=mx.int32), pending)

    @staticmethod
    def _known_token(seat: Seat) -> int | None:
        position = seat.sequence.num_computed - 1
        tokens = seat.sequence.tokens
        return tokens[position] if position < len(tokens) else None


def _sampled(seat: Seat, tokens: SequenceOf[tuple[int, TokenLogprobs | None]]) -> Sampled:
    token_ids = tuple(token for token, _ in tokens)
    if seat.sampling.guide is not None:
        for token_id in token_ids:
            seat.sampling.guide.accept(token_id)
    logprobs = tuple(entry for _, entry in tokens if entry is not None)
    return Sampled(seat.sequence.id, token_ids, logprobs, _read_prompt_logprobs(seat))


def _read_prompt_logprobs(seat: Seat) -> tuple[TokenLogprobs, ...]:
    """For each prompt token but the first, once: with the sequence's first token."""
    chunks, seat.prompt_logprobs = seat.prompt_logprobs, []
    if not chunks or seat.sequence.num_completion_tokens:
        return ()
    return read_logprobs(seat.sequence.request.prompt.token_ids[1:], chunks)
