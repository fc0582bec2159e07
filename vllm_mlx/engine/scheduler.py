"""Decides what each step computes. Plain Python, no MLX, no threads, no clock but the one it is given.

A plan gives every running sequence that is ready its one decode token first; what is left of the token budget goes to
prefill chunks, then to admissions, in the order that the queue policy gives. Chunks end on a fixed grid of blocks, so
that few shapes are computed. Memory is counted in bytes of the rows' KV plus the prefix cache; a request is admitted
when what all are expected to grow to fits; when it does not after all, the scheduler evicts unlocked prefixes, then
preempts (swapping to disk what is dearer to compute again), then lets requests wait. What it asks of the prefix cache
and of the disk is in `prefix_visits.py` and `disk_visits.py`.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from vllm_mlx.engine.disk_tier import DiskTier
from vllm_mlx.engine.disk_visits import DiskVisits
from vllm_mlx.engine.ports import ChunkSizer as ChunkSizer
from vllm_mlx.engine.ports import FixedChunk as FixedChunk
from vllm_mlx.engine.ports import KVStore as KVStore
from vllm_mlx.engine.ports import Limits as Limits
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.prefix_visits import PrefixVisits
from vllm_mlx.engine.queue_policy import FairPolicy, QueueClock, QueuePolicy
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.sequence import Committed, Sequence, Status
from vllm_mlx.engine.speculative import draft_limits
from vllm_mlx.engine.step import Chunk, FinishReason, StepPlan, StepResult


@dataclass
class SchedulerCounters:
    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_prefilled_tokens: int = 0
    num_failed_steps: int = 0


class Scheduler:
    """Owner of all sequences. Engine thread only.

    `max_tokens_per_step` bounds prefill and decode together; `checkpoint_interval` is the token distance of whole-state
    checkpoints for models that need them (0 for none but message ends). `atomic_spans`: the model computes a media span
    in one piece. `grid`: prompts are cut at its multiples only, so that a prompt is computed in the same pieces
    whatever else goes on (`invariance.py`); a whole number of blocks, 0 for anywhere. `keeps_answers`: the prefix cache
    takes answers too, not only prompts; otherwise a preempted sequence decodes its answer again. `most_rows`:
    what the runner can hold, whatever the limits say. `judge` is asked after each token and names the loop that a
    sequence is caught in, if it is.
    `expected_completion`: tokens an answer is taken to have while none has been seen; then twice the moving average.
    `max_draft`: drafted tokens a row may verify in a step.
    """

    def __init__(
        self,
        store: KVStore,
        cache: PrefixCache | None,
        limits: Limits,
        *,
        max_tokens_per_step: int,
        chunk_sizer: ChunkSizer,
        block_size: int = 64,
        checkpoint_interval: int = 2048,
        atomic_spans: bool = False,
        grid: int = 0,
        keeps_answers: bool = True,
        most_rows: int | None = None,
        max_draft: int = 0,
        judge: Callable[[Sequence], str | None] = lambda sequence: None,
        policy: QueuePolicy | None = None,
        tier: DiskTier | None = None,
        expected_completion: int = 256,
    ) -> None:
        self.store = store
        self.prefixes = PrefixVisits(
            cache,
            store,
            block_size=block_size,
            grid=grid,
            checkpoint_interval=checkpoint_interval,
            atomic_spans=atomic_spans,
            keeps_answers=keeps_answers,
        )
        self.disk = DiskVisits(tier)
        self.policy: QueuePolicy = policy if policy is not None else FairPolicy()
        self.limits = limits
        self.counters = SchedulerCounters()
        self.queue_clock = QueueClock()
        self.waiting: OrderedDict[str, Sequence] = OrderedDict()
        self.running: OrderedDict[str, Sequence] = OrderedDict()
        self._max_tokens_per_step = max_tokens_per_step
        self._chunk_sizer = chunk_sizer
        self._block_size = block_size
        self._grid = grid
        self._keeps_answers = keeps_answers
        self._most_rows = most_rows
        self._atomic_spans = atomic_spans
        self._max_draft = max_draft
        self._judge = judge
        self._arrivals = itertools.count()
        self._ended: list[Sequence] = []
        self._expected_completion = float(expected_completion)
        self._wish: Sequence | None = None
        self._now = 0.0

    # ── arrivals and departures ─────────────────────────────────────────────────────────────────────────────────

    def add(self, request: Request, now: float) -> Sequence:
        """A new request waits; the policy says for whom."""
        sequence = Sequence(request, next(self._arrivals), now, redecodes=not self._keeps_answers)
        self.waiting[request.id] = sequence
        self.counters.num_prompt_tokens += len(request.prompt)
        return sequence

    def queue(self) -> list[Sequence]:
        """The waiting sequences, next first."""
        return self._in_order() if len(self.waiting) > 1 else list(self.waiting.values())

    def _in_order(self) -> list[Sequence]:
        num_missing = partial(self.prefixes.num_missing, now=self._now)
        return self.policy.order(self.waiting.values(), self._now, num_missing)

    def find(self, request_id: str) -> Sequence | None:
        return self.running.get(request_id) or self.waiting.get(request_id)

    def all(self) -> Iterable[Sequence]:
        return itertools.chain(self.running.values(), self.waiting.values())

    def expired(self, now: float) -> list[Sequence]:
        """Sequences whose deadline has passed."""
        return [s for s in self.all() if s.request.deadline is not None and s.request.deadline <= now]

    def finish(self, sequence: Sequence, reason: FinishReason, detail: str | None = None) -> None:
        """End a sequence from any state; its row and lease go back, what it computed stays in the prefix cache."""
        if sequence.status is Status.RUNNING:
            if reason is not FinishReason.ERROR:
                self.prefixes.store_all(sequence)
            self._leave_row(sequence)
            if reason in (FinishReason.STOP, FinishReason.LENGTH):
                self._expected_completion += 0.05 * (2 * sequence.num_completion_tokens - self._expected_completion)
        else:
            del self.waiting[sequence.id]
        sequence.restore = None  # what is on its way still comes into the prefix cache
        sequence.finish_reason = reason
        sequence.detail = detail
        sequence.move(Status.FINISHED)
        self._ended.append(sequence)

    def take_ended(self) -> list[Sequence]:
        """The sequences that ended since the last call; each is handed out once."""
        ended, self._ended = self._ended, []
        return ended

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    # ── planning ────────────────────────────────────────────────────────────────────────────────────────────────

    def plan(self, now: float) -> StepPlan:
        """What the next step computes; marks it as launched. An empty plan means there is nothing to do now."""
        self._now = now
        self.disk.serve(is_busy=bool(self.running))
        # Nobody is admitted in a plan that preempts: results of the preempted are still on their way.
        num_preempted = self.counters.num_preemptions
        self._grant_wish()
        budget = max(self._max_tokens_per_step, self.limits.max_rows + self._block_size)
        decode = self._plan_decode()
        prefilling = [s for s in self.running.values() if s.is_prefilling]
        deepest = max((s.num_computed for s in prefilling), default=0)  # deeper chunks cost more time and more memory
        left = min(budget - len(decode), self._chunk_sizer.limit(len(decode), deepest))
        chunks: list[Chunk] = []
        for sequence in self.policy.prefill_order(prefilling, now):
            left -= self._plan_chunk(sequence, left, chunks)
        while left >= self._block_size and self.counters.num_preemptions == num_preempted:
            admitted = self._admit(now)
            if admitted is None:
                break
            left -= self._plan_chunk(admitted, left, chunks)
        # Prompts come first: a step that computes chunks verifies no drafts.
        most = 0 if chunks else min(self._max_draft, left // max(1, len(decode)))
        limits = draft_limits(decode, most, self.store.bytes_for, self._free_bytes) if most else ()
        return StepPlan(tuple(s.id for s in decode), tuple(chunks), limits)

    def _plan_decode(self) -> list[Sequence]:
        """The running sequences that get their one token; when memory is short, those of the lowest rank give way."""
        ready = [s for s in self.running.values() if s.wants_token]
        # No token takes more than a sequence's first: enough to know as long as there is plenty.
        at_most = len(ready) * self.store.bytes_for(1)
        if at_most > self._free_bytes and not self._has_room(sum(self._growth(s) for s in ready)):
            ready = self._fit(ready)
        for sequence in ready:
            sequence.num_computed += 1
            sequence.num_pending += not sequence.is_repeating
        return ready

    def _fit(self, ready: list[Sequence]) -> list[Sequence]:
        """Those of `ready` that can grow by a token, after preempting where it must be."""
        fitting: list[Sequence] = []
        growth = 0
        for sequence in sorted(ready, key=self.policy.rank):
            if sequence.status is Status.RUNNING and self._make_room(growth + self._growth(sequence), sequence):
                growth += self._growth(sequence)
                fitting.append(sequence)
        return fitting

    def _plan_chunk(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        """Add the sequence's next chunk, if it has one and there is budget for it; returns its size."""
        if sequence.status is not Status.RUNNING or sequence.num_to_prefill <= 0 or left <= 0:
            return 0
        start = sequence.num_computed
        end = self._chunk_end(sequence, start, left, is_first=not chunks)
        if end == start:
            return 0
        final = start + sequence.num_to_prefill
        keep_state = end in self.prefixes.checkpoints(sequence)
        chunks.append(Chunk(sequence.id, start, end, is_last=end == final, keep_state=keep_state))
        sequence.num_computed = end
        sequence.num_chunks_pending += 1
        self.counters.num_prefilled_tokens += end - start
        self.policy.served(sequence, end - start, self._now)
        return end - start

    def _chunk_end(self, sequence: Sequence, start: int, left: int, *, is_first: bool) -> int:
        """Where the chunk from `start` ends: on the grid, at a checkpoint, or at the prompt's end; `start` for nowhere.

        Only a media span that must stay whole may pass the budget, and only as a step's first chunk.
        """
        final = start + sequence.num_to_prefill
        if self._grid:
            end = min((start // self._grid + 1) * self._grid, final)
            if end - start > left and not is_first:
                return start
        else:
            end = min(start + left, final)
            if end < final:
                end = end // self._block_size * self._block_size
        end = min([end, *(p for p in self.prefixes.checkpoints(sequence) if p > start)])
        if end <= start:
            return start
        whole = self._behind_atomic_span(sequence, end)
        return start if whole - start > left and not is_first else min(whole, final)

    def _behind_atomic_span(self, sequence: Sequence, position: int) -> int:
        """`position`, or the end of the media span it would cut, for models that need a span in one piece."""
        prompt = sequence.request.prompt
        if not self._atomic_spans:
            return position
        return next((s.end for s in prompt.media if s.start < position < s.end), position)

    # ── admission ───────────────────────────────────────────────────────────────────────────────────────────────

    def _admit(self, now: float) -> Sequence | None:
        """Move the next waiting sequence to running, with its prefix; None if there is none, or no room for it."""
        if not self.waiting:
            return None
        candidates = self._in_order()
        if len(self.running) >= min(self.limits.max_rows, self._most_rows or self.limits.max_rows):
            self._wish = candidates[0]
            return None
        sequence = next((s for s in candidates if not self._is_on_its_way(s)), None)
        if sequence is None:
            return None
        needed = self.store.bytes_for(len(sequence.tokens))
        if self.running and self._projected_bytes(sequence) > self.limits.kv_budget_bytes:
            self._wish = sequence
            return None
        lease = self.prefixes.match(sequence)
        if not self._has_room(needed):
            self.prefixes.release(lease)
            if self.running:
                self._wish = sequence
                return None
            lease = None  # the prefix itself may stand in the way: it can be evicted now that nobody holds it
            if not self._has_room(needed):
                self._refuse(sequence, needed)
                return self._admit(now)
        del self.waiting[sequence.id]
        self.queue_clock.admitted(now, is_queue_empty=not self.waiting)
        self.running[sequence.id] = sequence
        sequence.move(Status.RUNNING)
        sequence.restore = None
        if sequence.admitted is None:
            sequence.admitted = now
        self.prefixes.take(sequence, lease)
        self.store.open(sequence, lease)
        return sequence

    def _is_on_its_way(self, sequence: Sequence) -> bool:
        """Its prefix is being computed by another, or comes from disk: admitting it now would compute it again."""
        return self.prefixes.is_being_computed(sequence, self.running.values()) or self.disk.is_awaited(sequence)

    def _refuse(self, sequence: Sequence, num_bytes: int) -> None:
        detail = (
            f"the prompt needs {num_bytes / 2**20:.0f} MiB of KV cache, but the budget is "
            f"{self.limits.kv_budget_bytes / 2**20:.0f} MiB"
        )
        self.finish(sequence, FinishReason.ERROR, detail)

    def _grant_wish(self) -> None:
        """Preempt the running sequence of the lowest rank for one that found no room, if the policy finds it worth it.

        At the beginning of a plan, because what is planned already must not be preempted.
        """
        wish, self._wish = self._wish, None
        if wish is None or wish.status is not Status.WAITING or not self.running:
            return
        victim = max(self.running.values(), key=self.policy.rank)
        if self.policy.displaces(wish, victim, self._now):
            self.preempt(victim)

    # ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def kv_bytes(self) -> int:
        """Bytes the running sequences hold or have reserved: all their known and pending tokens."""
        return sum(self.store.bytes_for(s.num_tokens) for s in self.running.values())

    @property
    def _free_bytes(self) -> int:
        return self.limits.kv_budget_bytes - self.kv_bytes - self.prefixes.nbytes

    def _has_room(self, num_bytes: int) -> bool:
        """Room for `num_bytes` more, after evicting unlocked prefixes if need be."""
        excess = num_bytes - self._free_bytes
        return excess <= 0 or self.prefixes.evict(excess) >= excess

    def _growth(self, sequence: Sequence) -> int:
        """Bytes that one more token of the sequence takes."""
        return self.store.bytes_for(sequence.num_tokens + 1) - self.store.bytes_for(sequence.num_tokens)

    def _projected_bytes(self, newcomer: Sequence) -> int:
        """Bytes that the running sequences and one more will have grown to, by what answers usually take."""
        return sum(self._bytes_at_end(s) for s in (newcomer, *self.running.values()))

    def _bytes_at_end(self, sequence: Sequence) -> int:
        left = sequence.request.max_tokens - sequence.num_sampled
        likely = max(self._block_size, int(self._expected_completion) - sequence.num_sampled)
        return self.store.bytes_for(sequence.num_tokens + min(left, likely))

    def _make_room(self, num_bytes: int, sequence: Sequence) -> bool:
        """Room for a running sequence to grow: evict, then preempt those of lower rank, then itself.

        A sequence that has the whole budget for itself and still cannot grow ends with reason length.
        """
        while not self._has_room(num_bytes):
            if len(self.running) == 1:
                self.finish(sequence, FinishReason.LENGTH, "the KV cache memory is used up")
                return False
            victim = max(self.running.values(), key=self.policy.rank)
            self.preempt(victim)
            if victim is sequence:
                return False
        return True

    def preempt(self, sequence: Sequence, *, may_swap: bool = True) -> None:
        """Running back to waiting: its row is freed. What is neither in the prefix cache nor on disk is recomputed."""
        if may_swap:
            self._swap_out(sequence)
        self._leave_row(sequence)
        sequence.reset_progress()
        sequence.num_preemptions += 1
        sequence.num_restores = 0
        sequence.prefill_checked = float("-inf")
        self.counters.num_preemptions += 1
        sequence.move(Status.WAITING)
        self.waiting[sequence.id] = sequence

    def _swap_out(self, sequence: Sequence) -> None:
        num_tokens = self.prefixes.num_storable(sequence, sequence.num_known_computed)
        self.disk.swap_out(sequence, num_tokens, self.store, self._chunk_sizer)

    def _leave_row(self, sequence: Sequence) -> None:
        self.store.close(sequence)
        self.prefixes.release(sequence.lease)
        sequence.lease = None
        del self.running[sequence.id]

    # ── results ─────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, plan: StepPlan, result: StepResult, now: float) -> list[Committed]:
        """Apply a step's result: tokens appended, ends noticed, prefixes stored.

        A sequence that ended or was preempted since the launch is passed over; its token is discarded.
        """
        for request_id, detail in result.failures.items():
            if (failed := self.running.get(request_id)) is not None:
                self.finish(failed, FinishReason.ERROR, detail)
        for chunk in plan.chunks:
            sequence = self.running.get(chunk.request_id)
            if sequence is not None and sequence.num_chunks_pending:
                sequence.num_chunks_pending -= 1
                self.prefixes.store(sequence, chunk.end)
        committed = []
        for sampled in result.sampled:
            sequence = self.running.get(sampled.request_id)
            if sequence is None or not sequence.num_pending:
                continue
            sequence.num_pending -= 1
            sequence.num_computed += len(sampled.token_ids) - 1  # drafts that were kept are computed already
            sequence.max_batch_rows = max(sequence.max_batch_rows, len(plan.decode))
            token_ids = self._append(sequence, sampled.token_ids, now)
            logprobs = sampled.logprobs[: len(token_ids)]
            committed.append(Committed(sequence, token_ids, logprobs, sampled.prompt_logprobs))
        return committed

    def _append(self, sequence: Sequence, token_ids: tuple[int, ...], now: float) -> tuple[int, ...]:
        """Append up to the token that ends the sequence; returns those appended."""
        request = sequence.request
        for count, token_id in enumerate(token_ids, start=1):
            sequence.tokens.append(token_id)
            self.counters.num_completion_tokens += 1
            self.policy.served(sequence, 1, now)
            if sequence.first_token is None:
                sequence.first_token = now
            if token_id in request.stop_token_ids and sequence.num_completion_tokens > request.sampling.min_tokens:
                sequence.stop_token_id = token_id
                self.finish(sequence, FinishReason.STOP)
            elif (loop := self._judge(sequence)) is not None:
                self.finish(sequence, FinishReason.REPETITION, loop)
            elif sequence.num_completion_tokens >= request.max_tokens:
                self.finish(sequence, FinishReason.LENGTH)
            if sequence.status is Status.FINISHED:
                return token_ids[:count]
        return token_ids

    def abandon(self, request_ids: Iterable[str], detail: str) -> None:
        """A step failed as a whole: its sequences end with an error, all others are recomputed."""
        self.counters.num_failed_steps += 1
        failed = set(request_ids)
        for sequence in list(self.running.values()):
            if sequence.id in failed:
                self.finish(sequence, FinishReason.ERROR, detail)
            else:
                self.preempt(sequence, may_swap=False)
