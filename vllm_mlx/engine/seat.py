"""What the runner holds for one running sequence: its cache while it is prefilled, its sampling, its kept states.

The runner makes and drops seats; prompt chunks, guesses and decode steps work on them. MLX thread only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from vllm_mlx.engine.kv_cache import RowCache, StateCheckpoint
from vllm_mlx.engine.sampler import SamplingRow, read_logprobs
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.step import TokenLogprobs


@dataclass(eq=False)
class Seat:
    """`cache` is the sequence's own while it is prefilled, and None once it stands in the decode batch.

    `state` is what the model's positions depend on. `prompt_logprobs` are (chosen float32 [L], top values
    float32 [L, K], top ids uint32 [L, K]) of each chunk of L tokens, when the request wants them.
    """

    sequence: Sequence
    cache: RowCache | None
    sampling: SamplingRow
    state: Any | None
    checkpoints: dict[int, StateCheckpoint] = field(default_factory=dict)
    prompt_logprobs: list[tuple[mx.array, mx.array, mx.array]] = field(default_factory=list)

    @property
    def known_token(self) -> int | None:
        """The token that a decode step computes; None while it is only on the device."""
        position = self.sequence.num_computed - 1
        tokens = self.sequence.tokens
        return tokens[position] if position < len(tokens) else None

    def keep(self, checkpoint: StateCheckpoint) -> list[mx.array]:
        """Keep a whole state, and the one before it; returns the arrays that have to be evaluated."""
        self.checkpoints[checkpoint.position] = checkpoint
        for old in sorted(self.checkpoints)[:-2]:  # stored by now: a step is committed before the one after next
            del self.checkpoints[old]
        return checkpoint.arrays()

    def take_prompt_logprobs(self) -> tuple[TokenLogprobs, ...]:
        """For each prompt token but the first, once: with the sequence's first token. Waits for the arrays."""
        chunks, self.prompt_logprobs = self.prompt_logprobs, []
        if not chunks or self.sequence.num_completion_tokens:
            return ()
        return read_logprobs(self.sequence.request.prompt.token_ids[1:], chunks)
