"""Executes plans on the device: prompt chunks into a sequence's own cache, decode steps for all rows at once.

A prompt is prefilled (`prefill.py`) up to its last token, which the first decode step computes: so sampling happens in
one place only, and no logits are ever computed for a prompt. Which rows guess their next tokens is `guessing.py`'s; the
step that computes them is the same. `launch` starts the work and returns; `collect` waits for the tokens. MLX thread
only.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_mlx.engine.constraint import Guide, prepare_guides
from vllm_mlx.engine.decode_batch import DecodeBatch
from vllm_mlx.engine.drafted import sampling_rows, with_drafts
from vllm_mlx.engine.guessing import NO_RING, Guessing
from vllm_mlx.engine.invariance import Invariance, choose
from vllm_mlx.engine.kv_batch import BatchCache, grouped_entries
from vllm_mlx.engine.kv_cache import (
    Footprint,
    KVSegment,
    Layout,
    Quantization,
    RecurrentRow,
    StateCheckpoint,
    WindowRow,
    capacity_for,
    measure_footprint,
)
from vllm_mlx.engine.media_cache import MediaCache
from vllm_mlx.engine.prefill import Prefill
from vllm_mlx.engine.prefix_cache import Lease
from vllm_mlx.engine.sampler import BatchSampler, SampledBatch, SamplingRow
from vllm_mlx.engine.seat import Seat
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import Speculator, num_kept_of
from vllm_mlx.engine.step import Sampled, StepPlan, StepResult, TokenLogprobs
from vllm_mlx.models.base import Features, LanguageModel

log = logging.getLogger(__name__)


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
    much memory may be wasted on padding, whatever the ratio, as long as rows take less than `rows_bytes`.
    `is_invariant`: no answer may depend on what is computed beside it; `invariance` says what that takes here.
    `samples`: False on ranks that only compute their part.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        quantization: Quantization | None = None,
        media_cache: MediaCache[Features] | None = None,
        checkpoint_step: int = 0,
        slack_bytes: int = 16 << 20,
        rows_bytes: int | None = None,
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
        per_token = max(1, self.footprint.per_token)
        self._slack_tokens = slack_bytes // per_token
        self._most_tokens = rows_bytes // per_token if rows_bytes is not None else None
        self.needs_checkpoint = not example.is_sliceable
        self.is_batched = example.is_batchable and model.profile.runs_batched
        self.can_group = self.is_batched and model.can_group and self._decodes_in_groups()
        self.invariance = Invariance()
        if is_invariant:
            self.invariance = choose(model, self.layout, can_batch=self.is_batched, can_group=self.can_group)
            self.is_batched = self.is_batched and self.invariance.num_rows != 1
        self.guessing = Guessing(speculator, model, 0 if is_invariant else self._most_draft())
        media = media_cache if media_cache is not None else MediaCache[Features](budget_bytes=256 << 20)
        self._prefill = Prefill(model, self.layout, media, self.guessing)
        # A pack pads its prompts to the longest: other shapes, in other company.
        self.can_pack = self.can_group and not is_invariant and self._prefill.can_pack()
        self.checkpoint_step = checkpoint_step
        self._seats: dict[str, Seat] = {}
        self._batch: DecodeBatch | None = None
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

    def _most_draft(self) -> int:
        """Tokens that layers can take back after a wrong guess: recurrent states none, windows until they go round."""
        rows = self._example.rows
        if not self.can_group or any(isinstance(row, RecurrentRow) for row in rows):
            return 0
        return min((row.max_size for row in rows if isinstance(row, WindowRow)), default=NO_RING)

    @property
    def speculator(self) -> Speculator | None:
        """Who guesses for the rows; None where nobody does."""
        return self.guessing.speculator

    # ── KV, as the scheduler asks for it ────────────────────────────────────────────────────────────────────────

    def bytes_for(self, num_tokens: int) -> int:
        return self.footprint.bytes_for(num_tokens) + self.guessing.bytes_for(num_tokens)

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
        self.guessing.close(sequence.id)
        if seat.cache is None and self._batch is not None:
            self._batch.leave(sequence.id)
            if not len(self._batch):
                self._batch = None
        if not self._seats:
            self.guessing.rest()
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
        return self.guessing.drafts(seats, plan.draft_limits, self._batch) if plan.draft_limits else ()

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
        sampled, states = self._decode(seats, drafts) if seats else (None, None)
        self._prefill.compute(plan.chunks, self._seats, in_packs=self.can_pack)
        overlap = not any(seat.sampling.needs_host_token for seat in seats) and not any(drafts)
        overlap = overlap and not (plan.draft_limits and self.guessing.expects(seats, self._batch))
        asking = tuple(seat for seat in seats if not seat.sequence.is_repeating)
        # Who repeats does so for --batch-invariant, where nobody guesses: then there are no states.
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
                    self.guessing.verified(seat.sequence, len(draft), kept)
                    seat.sampling.num_completion += kept
                    self.keep(seat.sequence.id, kept)
                    num_kept += kept
                # It may have ended while its step was on its way.
                if launched.states is not None and self._seats.get(seat.sequence.id) is seat:
                    self.guessing.saw(seat.sequence, position, launched.states[first : first + kept + 1])
                results.append(_sampled(seat, tokens[first : first + kept + 1]))
            first = last + 1
        self.guessing.observe(launched.plan, len(tokens), len(launched.seats), num_kept)
        return StepResult(tuple(results), failures)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """So many of the row's drafts in the last step are its own tokens now; the others are written over."""
        if self._batch is not None:
            self._batch.keep(request_id, num_tokens)

    def metrics(self) -> Mapping[str, object]:
        batch = self._batch
        own = sum(a.nbytes for seat in self._seats.values() if seat.cache is not None for a in seat.cache.state)
        return {
            "batch_rows": batch.num_rows if batch else 0,
            "batch_groups": batch.num_groups if batch else 0,
            "kv_held_bytes": own + (batch.nbytes if batch else 0),
            "kv_waste_ratio": batch.waste_ratio if batch else 1.0,
            **({"batch_invariance": self.invariance.name} if self.invariance.is_promised else {}),
            **self._prefill.metrics(),
            **self.guessing.metrics(),
        }

    # ── one decode step ─────────────────────────────────────────────────────────────────────────────────────────

    def _decode(
        self, seats: SequenceOf[Seat], drafts: SequenceOf[tuple[int, ...]] = ()
    ) -> tuple[SampledBatch | None, mx.array | None]:
        """What is sampled, None where nobody asks; and the states [T, D] behind the tokens, where a head guesses."""
        states = None
        if self.is_batched:
            logits, states = self._batched_logits(seats, drafts or ((),) * len(seats))
        else:
            logits = self._single_logits(seats)
        asking = [i for i, seat in enumerate(seats) if not seat.sequence.is_repeating]
        if not self._samples or not asking:
            mx.eval(logits, self._states(seats), self._keep_states(seats))
            return None, None
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
        return sampled, states

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
            kept += seat.keep(checkpoint)
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
                copies_quickly=mx.cuda.is_available(),
                most_tokens=self._most_tokens,
            )
        for seat in seats:
            if seat.cache is not None:
                self._batch.join(seat.sequence.id, seat.cache, seat.sequence.num_computed - 1)
                seat.cache = None
        self._batch.arrange()

    def _batched_logits(
        self, seats: SequenceOf[Seat], drafts: SequenceOf[tuple[int, ...]]
    ) -> tuple[mx.array, mx.array | None]:
        """Logits [T, V] of one forward over all rows of the batch: for each seat its next token, then its drafts. And
        the states [T, D] behind them, where a head guesses."""
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
        behind = self.guessing.head.states[:, 0] if self.guessing.head is not None else None
        if not is_in_order:
            order = mx.array(indices, dtype=mx.uint32)
            logits, behind = logits[order], behind[order] if behind is not None else None
        return logits, behind

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
        known = [seat.known_token for seat in seats]
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


def _sampled(seat: Seat, tokens: SequenceOf[tuple[int, TokenLogprobs | None]]) -> Sampled:
    token_ids = tuple(token for token, _ in tokens)
    if seat.sampling.guide is not None:
        for token_id in token_ids:
            seat.sampling.guide.accept(token_id)
    logprobs = tuple(entry for _, entry in tokens if entry is not None)
    return Sampled(seat.sequence.id, token_ids, logprobs, seat.take_prompt_logprobs())
