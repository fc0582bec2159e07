"""How large a prompt chunk may be beside running streams, learnt from the steps seen. No MLX, no clock.

A stream's tokens should never be further apart than a target. A step's time is taken as what its decode rows cost plus
a cost per prompt token, both followed by moving averages; the chunk is what fits under the target, on the grid of
blocks. With nobody decoding, nobody waits, and chunks are as large as allowed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_mlx.engine.step import StepPlan

_FOLLOW = 0.3
# Chunk beside running streams while the cost of a token is not known yet.
_UNKNOWN_COST_BLOCKS = 8


@dataclass
class StallBoundedChunk:
    """`target_s`: longest gap between a running stream's tokens that a chunk may cause.

    `most_in_memory` gives the largest chunk at a depth whose activations fit the memory kept for them.
    `num_decoding_elsewhere`: rows of other engines on the same thread, which wait for this engine's steps too.
    """

    target_s: float
    max_tokens: int
    block_size: int
    most_in_memory: Callable[[int], int] = lambda context: 1 << 30
    num_decoding_elsewhere: int = 0
    decode_s: float = 0.0
    seconds_per_token: float | None = None

    def limit(self, num_decoding: int, context: int) -> int:
        """Prompt tokens the next step may compute; a whole number of blocks, at least one."""
        fitting = self.most_in_memory(context) // self.block_size * self.block_size
        return max(self.block_size, min(self._within_target(num_decoding), fitting))

    def _within_target(self, num_decoding: int) -> int:
        if not num_decoding and not self.num_decoding_elsewhere:
            return self.max_tokens
        if self.seconds_per_token is None:
            return min(self.max_tokens, _UNKNOWN_COST_BLOCKS * self.block_size)
        fitting = int(max(self.target_s - self.decode_s, 0.0) / self.seconds_per_token)
        return max(self.block_size, min(self.max_tokens, fitting // self.block_size * self.block_size))

    def share(self, num_decoding_elsewhere: int) -> None:
        self.num_decoding_elsewhere = num_decoding_elsewhere

    def seconds_for(self, num_tokens: int) -> float | None:
        """What computing so many prompt tokens takes; None while it is not known."""
        return None if self.seconds_per_token is None else num_tokens * self.seconds_per_token

    def observe(self, plan: StepPlan, elapsed_s: float) -> None:
        """Learn from a finished step; only steps that decoded something are timed to their end."""
        if not plan.decode:
            return
        num_prefilled = plan.num_tokens - len(plan.decode)
        if not num_prefilled:
            self.decode_s += _FOLLOW * (elapsed_s - self.decode_s)
            return
        cost = max(elapsed_s - self.decode_s, 1e-6) / num_prefilled
        known = self.seconds_per_token
        self.seconds_per_token = cost if known is None else known + _FOLLOW * (cost - known)
