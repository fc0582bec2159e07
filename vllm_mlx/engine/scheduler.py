"""Decides what each step computes. Plain Python, no MLX, no threads, no clock but the one it is given.

A plan gives every running sequence that is ready its one decode token first; what is left of the token budget goes to
prefill chunks, then to admissions, in the order that the queue policy gives. Chunks end on a fixed grid of blocks, so
that few shapes are computed. Memory is counted in bytes of the rows' KV plus the prefix cache; a request is admitted
when what all are expected to grow to fits; when it does not after all, the scheduler evicts unlocked prefixes, then
preempts (swapping to disk what is dearer to compute again), then lets requests wait.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from vllm_mlx.engine.disk_tier import DiskTier
from vllm_mlx.engine.disk_visits import DiskVisits
from vllm_mlx.engine.ports import ChunkSizer as ChunkSizer
from vllm_mlx.engine.ports import FixedChunk as FixedChunk
from vllm_mlx.engine.ports import KVStore as KVStore
from vllm_mlx.engine.ports import Limits as Limits
from vllm_mlx.engine.prefix_cache import Lease, PrefixCache, common_prefix, report_lease
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
        self.disk = DiskVisits(tier)
        self.policy: QueuePolicy = policy if policy is not None else FairPolicy()
        self.cache = cache
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
        # Prefixes are stored and taken over in whole grains.
        self._grain = max(block_size, grid)
        self._checkpoint_interval = checkpoint_interval // self._grain * self._grain
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
        waiting = list(self.waiting.values())
        return self.policy.order(waiting, self._now, self._prefill_left) if len(waiting) > 1 else waiting

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
                self._keep_computed(sequence)
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

    def _refuse(self, sequence: Sequence, num_bytes: int) -> None:
        detail = (
            f"the prompt needs {num_bytes / 2**20:.0f} MiB of KV cache, but the budget is "
            f"{self.limits.kv_budget_bytes / 2**20:.0f} MiB"
        )
        self.finish(sequence, FinishReason.ERROR, detail)

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
        left = min(budget - len(decode), self._chunk_sizer.limit(len(decode), self._deepest_prefill()))
        chunks: list[Chunk] = []
        for sequence in self.policy.prefill_order([s for s in self.running.values() if s.is_prefilling], now):
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
        if not self._has_room(sum(self._growth(s) for s in ready)):
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

    def _growth(self, sequence: Sequence) -> int:
        """Bytes that one more token of the sequence takes."""
        return self.store.bytes_for(sequence.num_tokens + 1) - self.store.bytes_for(sequence.num_tokens)

    def _plan_chunk(self, sequence: Sequence, left: int, chunks: list[Chunk]) -> int:
        """Add the sequence's next chunk, if it has one and there is budget for it; returns its size."""
        if sequence.status is not Status.RUNNING or sequence.num_to_prefill <= 0 or left <= 0:
            return 0
        start = sequence.num_computed
        end = self._chunk_end(sequence, start, left, is_first=not chunks)
        if end == start:
            return 0
        final = start + sequence.num_to_prefill
        keep_state = end in self._checkpoints(sequence)
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
        end = min([end, *(p for p in self._checkpoints(sequence) if p > start)])
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

    def _checkpoints(self, sequence: Sequence) -> tuple[int, ...]:
        """Positions, ascending, where this prompt's whole state is kept, for caches that cannot be sliced."""
        if self.cache is None or not self.cache.needs_checkpoint:
            return ()
        if sequence.checkpoints is None:
            grain, length = self._grain, sequence.prefill_end + 1
            positions = {p // grain * grain for p in sequence.request.prompt.boundaries}
            positions |= {(length - 1) // grain * grain, sequence.branch_point // grain * grain}
            if self._checkpoint_interval:
                positions.update(range(self._checkpoint_interval, length, self._checkpoint_interval))
            sequence.checkpoints = tuple(sorted(p for p in positions if 0 < p < length))
        return sequence.checkpoints

    def _deepest_prefill(self) -> int:
        """Context depth of the deepest prefill: deeper chunks cost more time and more memory."""
        return max((s.num_computed for s in self.running.values() if s.is_prefilling), default=0)

    # ── admission and memory ────────────────────────────────────────────────────────────────────────────────────

    @property
    def kv_bytes(self) -> int:
        """Bytes the running sequences hold or have reserved: all their known and pending tokens."""
        return sum(self.store.bytes_for(s.num_tokens) for s in self.running.values())

    def _admit(self, now: float) -> Sequence | None:
        """Move the next waiting sequence to running, with its prefix; None if there is none, or no room for it."""
        if not self.waiting:
            return None
        candidates = self.policy.order(self.waiting.values(), now, self._prefill_left)
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
        lease: Lease | None = self._match(sequence)
        if not self._has_room(needed):
            self._release(lease)
            if self.running:
                self._wish = sequence
                return None
            lease = None  # the prefix itself may stand in the way: it can be evicted now that nobody holds it
            if not self._has_room(needed):
                self._refuse(sequence, needed)
                return self._admit(now)
        if lease is not None and self.cache is not None:
            self.cache.count_use(lease)
        num_cached = lease.num_tokens if lease else 0
        del self.waiting[sequence.id]
        self.queue_clock.admitted(now, is_queue_empty=not self.waiting)
        self.running[sequence.id] = sequence
        sequence.move(Status.RUNNING)
        sequence.lease = lease
        sequence.restore = None
        sequence.num_computed = sequence.num_inserted = num_cached
        sequence.branch_point = lease.num_matched if lease else 0
        sequence.checkpoints = None
        if sequence.admitted is None:
            sequence.admitted = now
            sequence.cache_report = report_lease(len(sequence.tokens), lease)
            self._count_reason(sequence, lease)
        self.store.open(sequence, lease)
        return sequence

    def _count_reason(self, sequence: Sequence, lease: Lease | None) -> None:
        """Why prompts had to compute more than their last token, for the metrics."""
        if self.cache is not None and lease is not None:
            if lease.reason is not None:
                self.cache.counters.num_without_checkpoint += 1
            elif lease.num_matched < len(sequence.tokens) - 1:
                self.cache.counters.num_diverged += 1

    def _grant_wish(self) -> None:
        """Preempt the running sequence of the lowest rank for one that found no room, if the policy finds it worth it.

        At the beginning of a plan, because what is planned already must not be preempted.
        """
        wish, self._wish = self._wish, None
        victim = max(self.running.values(), key=self.policy.rank, default=None)
        if wish is not None and victim is not None and wish.status is Status.WAITING:
            if self.policy.displaces(wish, victim, self._now):
                self.preempt(victim)

    def _projected_bytes(self, newcomer: Sequence) -> int:
        """Bytes that the running sequences and one more will have grown to, by what answers usually take."""
        return sum(self._bytes_at_end(s) for s in (newcomer, *self.running.values()))

    def _bytes_at_end(self, sequence: Sequence) -> int:
        left = sequence.request.max_tokens - sequence.num_sampled
        likely = max(self._block_size, int(self._expected_completion) - sequence.num_sampled)
        return self.store.bytes_for(sequence.num_tokens + min(left, likely))

    def _prefill_left(self, sequence: Sequence) -> int:
        """Prompt tokens that the prefix cache does not have; looked up at most once a second."""
        if self._now - sequence.prefill_checked >= 1.0:
            sequence.prefill_checked = self._now
            sequence.prefill_left = len(sequence.tokens)
            if self.cache is not None and not sequence.request.skips_prefix_cache:
                sequence.prefill_left -= self.cache.match_length(
                    sequence.cache_key, namespace=sequence.request.namespace, usable_only=True
                )
        return sequence.prefill_left

    def _is_on_its_way(self, sequence: Sequence) -> bool:
        """Its prefix is being computed by another, or comes from disk: admitting it now would compute it again."""
        return self._is_being_prefilled(sequence) or self.disk.is_awaited(sequence)

    def _match(self, sequence: Sequence) -> Lease | None:
        """Lock the longest usable prefix; at least the last token is left, because decoding computes it.

        Prompt logprobs need every position computed, so a request for them takes nothing from the cache.
        """
        if self.cache is None or sequence.request.skips_prefix_cache:
            return None
        namespace = sequence.request.namespace
        wants_all = sequence.request.num_prompt_logprobs is not None
        key, limit = sequence.cache_key, 0 if wants_all else sequence.prefill_end
        lease = self.cache.match(key, namespace=namespace, limit=limit, is_use=False)
        while (whole := self._reusable(sequence, lease.num_tokens)) < lease.num_tokens:
            self.cache.release(lease)
            lease = self.cache.match(key, namespace=namespace, limit=whole, is_use=False)
        return lease

    def _is_being_prefilled(self, sequence: Sequence) -> bool:
        """A running prompt is about to store more of this one's prefix than is stored now: waiting computes it once."""
        request = sequence.request
        if self.cache is None or request.num_prompt_logprobs is not None or request.skips_prefix_cache:
            return False
        leaders = [s for s in self.running.values() if s.will_store_prefix and self._shares_cache(s, sequence)]
        if not leaders:
            return False
        key, limit = sequence.cache_key, sequence.prefill_end
        stored = self.cache.match_length(key, namespace=sequence.request.namespace, usable_only=True)
        coming = max(self._will_store(leader, key) for leader in leaders)
        return min(coming, limit) - stored >= self._block_size

    @staticmethod
    def _shares_cache(leader: Sequence, sequence: Sequence) -> bool:
        request = leader.request
        stores = request.num_prompt_logprobs is None and not request.skips_prefix_cache
        return stores and request.namespace == sequence.request.namespace

    def _will_store(self, leader: Sequence, key: tuple[int, ...]) -> int:
        """Tokens of `key` that a prefilling sequence will have put into the prefix cache, as far as it is known."""
        shared = common_prefix(leader.cache_key, key)
        if self.cache is None or not self.cache.needs_checkpoint:
            return shared // self._grain * self._grain
        return max((p for p in self._checkpoints(leader) if p <= shared), default=0)

    def _reusable(self, sequence: Sequence, num_tokens: int) -> int:
        """As much of a stored prefix as this prompt would have computed in the same pieces."""
        whole = self._before_atomic_span(sequence, num_tokens)
        return whole // self._grid * self._grid if self._grid else whole

    def _before_atomic_span(self, sequence: Sequence, position: int) -> int:
        if not self._atomic_spans:
            return position
        return next((s.start for s in sequence.request.prompt.media if s.start < position < s.end), position)

    def _release(self, lease: Lease | None) -> None:
        if lease is not None and self.cache is not None:
            self.cache.release(lease)

    @property
    def _free_bytes(self) -> int:
        return self.limits.kv_budget_bytes - self.kv_bytes - (self.cache.nbytes if self.cache else 0)

    def _has_room(self, num_bytes: int) -> bool:
        """Room for `num_bytes` more, after evicting unlocked prefixes if need be."""
        excess = num_bytes - self._free_bytes
        if excess <= 0:
            return True
        return self.cache is not None and self.cache.evict(excess) >= excess

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
        num_tokens = min(sequence.num_computed, len(sequence.tokens))
        if not self._keeps_answers:
            num_tokens = min(num_tokens, sequence.num_prompt_tokens - 1)
        self.disk.swap_out(sequence, num_tokens // self._grain * self._grain, self.store, self._chunk_sizer)

    def _leave_row(self, sequence: Sequence) -> None:
        self.store.close(sequence)
        self._release(sequence.lease)
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
                self._store_prefix(sequence, chunk.end)
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

    # ── the prefix cache ────────────────────────────────────────────────────────────────────────────────────────

    def _keep_computed(self, sequence: Sequence) -> None:
        """Store what an ending sequence computed, as far as its tokens are known, to the last of them."""
        num_tokens = min(sequence.num_computed, len(sequence.tokens))
        self._store_prefix(sequence, num_tokens)
        keeps_tail = self.cache is not None and not self.cache.needs_checkpoint and not self._grid
        if self.cache is not None and keeps_tail and not sequence.request.skips_prefix_cache:
            self.cache.insert_tail(
                sequence.cache_key[: self._keepable(sequence, num_tokens)],
                lambda start, end: self.store.segment(sequence, start, end),
                namespace=sequence.request.namespace,
            )

    def _keepable(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if self._keeps_answers else min(num_tokens, sequence.num_prompt_tokens - 1)

    def _store_prefix(self, sequence: Sequence, num_tokens: int) -> None:
        """Store the whole grains of what was computed."""
        if self.cache is None or sequence.request.skips_prefix_cache:
            return
        num_tokens = self._keepable(sequence, num_tokens) // self._grain * self._grain
        checkpoint = None
        if self.cache.needs_checkpoint:
            checkpoint = self.store.checkpoint(sequence, num_tokens)
            if checkpoint is None:
                return
        elif num_tokens <= sequence.num_inserted:
            return
        sequence.num_inserted = self.cache.insert(
            sequence.cache_key[:num_tokens],
            lambda start, end: self.store.segment(sequence, start, end),
            checkpoint=checkpoint,
            namespace=sequence.request.namespace,
        )
