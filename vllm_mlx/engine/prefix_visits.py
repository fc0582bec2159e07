"""When the scheduler turns to the prefix cache: what a prompt takes from it, whom it waits for, what is stored there.

A part of the scheduler, as `disk_visits.py` is; without a cache every question has the answer that nothing is stored.
Prefixes are stored and taken over in whole grains: a block, or the grid where prompts are cut at that only. No MLX;
engine thread.
"""

from __future__ import annotations

from collections.abc import Iterable

from vllm_mlx.engine.ports import KVStore
from vllm_mlx.engine.prefix_cache import Lease, PrefixCache, common_prefix, report_lease
from vllm_mlx.engine.sequence import Sequence


class PrefixVisits:
    """Everything the scheduler asks of the cache; the arguments are what `Scheduler` says of them."""

    def __init__(
        self,
        cache: PrefixCache | None,
        store: KVStore,
        *,
        block_size: int,
        grid: int,
        checkpoint_interval: int,
        atomic_spans: bool,
        keeps_answers: bool,
    ) -> None:
        self.cache = cache
        self._store = store
        self._block_size = block_size
        self._grid = grid
        self._grain = max(block_size, grid)
        self._checkpoint_interval = checkpoint_interval // self._grain * self._grain
        self._atomic_spans = atomic_spans
        self._keeps_answers = keeps_answers

    @property
    def nbytes(self) -> int:
        return self.cache.nbytes if self.cache is not None else 0

    def evict(self, num_bytes: int) -> int:
        """Drop what nobody holds until so many bytes are free; returns the bytes freed."""
        return self.cache.evict(num_bytes) if self.cache is not None else 0

    # ── a prompt's turn ─────────────────────────────────────────────────────────────────────────────────────────

    def num_missing(self, sequence: Sequence, now: float) -> int:
        """Prompt tokens that the cache does not have; looked up at most once a second."""
        if now - sequence.prefill_checked >= 1.0:
            sequence.prefill_checked = now
            sequence.prefill_left = len(sequence.tokens)
            if self.cache is not None and not sequence.request.skips_prefix_cache:
                sequence.prefill_left -= self.cache.match_length(
                    sequence.cache_key, namespace=sequence.request.namespace, usable_only=True
                )
        return sequence.prefill_left

    def is_being_computed(self, sequence: Sequence, running: Iterable[Sequence]) -> bool:
        """A running prompt is about to store more of this one's prefix than is stored now: waiting computes it once."""
        request = sequence.request
        if self.cache is None or request.num_prompt_logprobs is not None or request.skips_prefix_cache:
            return False
        leaders = [s for s in running if s.will_store_prefix and _shares_cache(s, sequence)]
        if not leaders:
            return False
        key, limit = sequence.cache_key, sequence.prefill_end
        stored = self.cache.match_length(key, namespace=sequence.request.namespace, usable_only=True)
        coming = max(self._will_store(leader, key) for leader in leaders)
        return min(coming, limit) - stored >= self._block_size

    def _will_store(self, leader: Sequence, key: tuple[int, ...]) -> int:
        """Tokens of `key` that a prefilling sequence will have put into the cache, as far as it is known."""
        shared = common_prefix(leader.cache_key, key)
        if self.cache is None or not self.cache.needs_checkpoint:
            return shared // self._grain * self._grain
        return max((p for p in self.checkpoints(leader) if p <= shared), default=0)

    def match(self, sequence: Sequence) -> Lease | None:
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

    def _reusable(self, sequence: Sequence, num_tokens: int) -> int:
        """As much of a stored prefix as this prompt would have computed in the same pieces."""
        whole = num_tokens
        if self._atomic_spans:
            spans = sequence.request.prompt.media
            whole = next((s.start for s in spans if s.start < num_tokens < s.end), num_tokens)
        return whole // self._grid * self._grid if self._grid else whole

    def take(self, sequence: Sequence, lease: Lease | None) -> None:
        """The sequence begins with what was matched: that much of it is computed. Its first time is reported."""
        sequence.lease = lease
        sequence.num_computed = sequence.num_inserted = lease.num_tokens if lease else 0
        sequence.branch_point = lease.num_matched if lease else 0
        sequence.checkpoints = None
        if lease is not None and self.cache is not None:
            self.cache.count_use(lease)
        if sequence.cache_report is None:
            sequence.cache_report = report_lease(len(sequence.tokens), lease)
            self._count_reason(sequence, lease)

    def _count_reason(self, sequence: Sequence, lease: Lease | None) -> None:
        """Why prompts had to compute more than their last token, for the metrics."""
        if self.cache is not None and lease is not None:
            if lease.reason is not None:
                self.cache.counters.num_without_checkpoint += 1
            elif lease.num_matched < len(sequence.tokens) - 1:
                self.cache.counters.num_diverged += 1

    def release(self, lease: Lease | None) -> None:
        """End the hold on a prefix; None and doing it twice do nothing."""
        if lease is not None and self.cache is not None:
            self.cache.release(lease)

    # ── what it leaves behind ───────────────────────────────────────────────────────────────────────────────────

    def checkpoints(self, sequence: Sequence) -> tuple[int, ...]:
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

    def store(self, sequence: Sequence, num_tokens: int) -> None:
        """Store the whole grains of what was computed."""
        if self.cache is None or sequence.request.skips_prefix_cache:
            return
        num_tokens = self.num_storable(sequence, num_tokens)
        checkpoint = None
        if self.cache.needs_checkpoint:
            checkpoint = self._store.checkpoint(sequence, num_tokens)
            if checkpoint is None:
                return
        elif num_tokens <= sequence.num_inserted:
            return
        sequence.num_inserted = self.cache.insert(
            sequence.cache_key[:num_tokens],
            lambda start, end: self._store.segment(sequence, start, end),
            checkpoint=checkpoint,
            namespace=sequence.request.namespace,
        )

    def store_all(self, sequence: Sequence) -> None:
        """Store what an ending sequence computed, as far as its tokens are known, to the last of them."""
        num_tokens = sequence.num_known_computed
        self.store(sequence, num_tokens)
        keeps_tail = self.cache is not None and not self.cache.needs_checkpoint and not self._grid
        if self.cache is not None and keeps_tail and not sequence.request.skips_prefix_cache:
            self.cache.insert_tail(
                sequence.cache_key[: self._keepable(sequence, num_tokens)],
                lambda start, end: self._store.segment(sequence, start, end),
                namespace=sequence.request.namespace,
            )

    def num_storable(self, sequence: Sequence, num_tokens: int) -> int:
        """Of the first `num_tokens` of a sequence, those in whole grains that others may take over."""
        return self._keepable(sequence, num_tokens) // self._grain * self._grain

    def _keepable(self, sequence: Sequence, num_tokens: int) -> int:
        return num_tokens if self._keeps_answers else min(num_tokens, sequence.num_prompt_tokens - 1)


def _shares_cache(leader: Sequence, sequence: Sequence) -> bool:
    request = leader.request
    stores = request.num_prompt_logprobs is None and not request.skips_prefix_cache
    return stores and request.namespace == sequence.request.namespace
