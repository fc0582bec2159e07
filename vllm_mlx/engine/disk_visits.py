"""When the scheduler turns to the disk tier: what it copies in a step, who waits for a prefix, which rows go there.

A part of the scheduler; without a tier every question has the answer that there is no disk. No MLX; engine thread.
"""

from __future__ import annotations

from vllm_mlx.engine.disk_tier import MIB, DiskTier
from vllm_mlx.engine.ports import ChunkSizer, KVStore
from vllm_mlx.engine.sequence import Sequence

# Copied to or from the disk's buffers in one step: beside running streams, and when nobody waits for a token.
_BYTES_A_STEP, _BYTES_IDLE = 16 * MIB, 256 * MIB
_MAX_RESTORES = 2


class DiskVisits:
    """Everything the scheduler asks of the tier."""

    def __init__(self, tier: DiskTier | None) -> None:
        self.tier = tier

    def serve(self, *, is_busy: bool) -> None:
        """The disk's share of a step."""
        if self.tier is not None:
            self.tier.poll(_BYTES_A_STEP if is_busy else _BYTES_IDLE)
            self.tier.harvest(_BYTES_A_STEP)

    def rest(self) -> None:
        """Nothing could be planned although somebody waits: let the disk go on."""
        if self.tier is not None and self.tier.restores.under_way:
            self.tier.jobs.wait(0.02)

    def idle(self) -> bool:
        """A moment with nothing to compute: write what is worth keeping. True while more can be written."""
        if self.tier is None:
            return False
        self.tier.poll(_BYTES_IDLE)
        self.tier.harvest(_BYTES_A_STEP, is_idle=True)
        return self.tier.has_pending or bool(self.tier.restores.under_way)

    def is_awaited(self, sequence: Sequence) -> bool:
        """Look on the disk, once it is this sequence's turn, and wait for what is there."""
        request = sequence.request
        if self.tier is None or request.skips_prefix_cache or request.num_prompt_logprobs is not None:
            return False
        if sequence.restore is not None:
            if not sequence.restore.is_done:
                return True
            sequence.restore = None
        if sequence.num_restores >= _MAX_RESTORES:
            return False
        key, limit = sequence.cache_key, sequence.prefill_end
        if not sequence.is_on_disk:
            sequence.is_on_disk = self.tier.restores.is_worth_reading(key, request.namespace, limit)
            if not sequence.is_on_disk:
                sequence.num_restores = _MAX_RESTORES  # looking again each step is not free
                return False
        if self.tier.restores.is_busy:
            return True
        sequence.num_restores += 1
        sequence.is_on_disk = False
        sequence.restore = self.tier.restores.begin(key, request.namespace, limit)
        return sequence.restore is not None

    def swap_out(self, sequence: Sequence, num_tokens: int, store: KVStore, sizer: ChunkSizer) -> None:
        """Write the row's first `num_tokens` (whole blocks) where reading is cheaper than computing them again."""
        if self.tier is None or not num_tokens or sequence.request.skips_prefix_cache:
            return
        cache = self.tier.cache
        checkpoint = store.checkpoint(sequence, num_tokens) if cache.needs_checkpoint else None
        if cache.needs_checkpoint and checkpoint is None:
            return
        key, namespace = sequence.cache_key[:num_tokens], sequence.request.namespace
        to_compute = num_tokens - cache.match_length(key, namespace=namespace, usable_only=True)
        recompute_s = sizer.seconds_for(to_compute)
        if recompute_s is not None and self.tier.swap_seconds(store.bytes_for(num_tokens)) < recompute_s:
            self.tier.save_row(key, namespace, lambda start, end: store.segment(sequence, start, end), checkpoint)
