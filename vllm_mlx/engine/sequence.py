"""A request inside the engine: its tokens and its progress. Engine thread only; the one mutable noun of the engine.

Progress is a number. A sequence has tokens (prompt and completion); `num_computed` of them are in the KV cache; a step
moves the second number towards the first. With the next step launched before the last one's tokens are read,
`num_pending` tokens are sampled on the device but not yet known here.

    tokens     |---- prompt ----|-- completion --|. pending .|
    computed   |===========================......|
                                ^ num_computed counts launched work too

Every token is computed exactly once; the last known (or pending) one is what the next decode step computes. After a
preemption all of it is computed again: in chunks, or, where the shapes of a computation must stay what they were, the
prompt in chunks and the answer in decode steps whose outcome is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from vllm_mlx.engine.prefix_cache import Lease
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import CacheReport, FinishReason, Timings, TokenLogprobs, Usage

if TYPE_CHECKING:
    from vllm_mlx.engine.disk_restores import Restore


class Status(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


_LEGAL = {
    (Status.WAITING, Status.RUNNING),
    (Status.RUNNING, Status.WAITING),  # preemption, or a failed step
    (Status.WAITING, Status.FINISHED),  # cancelled before it ran
    (Status.RUNNING, Status.FINISHED),
}


@dataclass(eq=False)
class Sequence:
    """`order` is the arrival number: lower is older, and the youngest is preempted first.

    `restore` is a prefix on its way from disk, `num_restores` how many were begun, `is_on_disk` that one is due.
    `redecodes`: of its answer nothing is computed in chunks or taken from the prefix cache (`invariance.py`).
    `prefill_left` is an estimate made at `prefill_checked`, for the order of the queue.
    """

    request: Request
    order: int
    arrived: float
    tokens: list[int] = field(default_factory=list)
    num_prompt_tokens: int = field(init=False)
    redecodes: bool = False
    status: Status = Status.WAITING
    num_computed: int = 0
    num_pending: int = 0
    num_chunks_pending: int = 0
    lease: Lease | None = None
    finish_reason: FinishReason | None = None
    detail: str | None = None
    stop_token_id: int | None = None
    admitted: float | None = None
    first_token: float | None = None
    cache_report: CacheReport | None = None
    max_batch_rows: int = 1
    num_preemptions: int = 0
    num_inserted: int = 0
    branch_point: int = 0
    checkpoints: tuple[int, ...] | None = None
    restore: Restore | None = None
    num_restores: int = 0
    is_on_disk: bool = False
    prefill_left: int = 0
    prefill_checked: float = float("-inf")

    def __post_init__(self) -> None:
        self.num_prompt_tokens = len(self.request.prompt)
        if not self.tokens:
            self.tokens = list(self.request.prompt.token_ids)

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def num_completion_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_tokens(self) -> int:
        """Known and pending tokens."""
        return len(self.tokens) + self.num_pending

    @property
    def num_sampled(self) -> int:
        """Completion tokens known or on their way."""
        return self.num_completion_tokens + self.num_pending

    @property
    def num_known_computed(self) -> int:
        """Computed tokens that are known here: the last computed one may still be pending."""
        return min(self.num_computed, len(self.tokens))

    @property
    def prefill_end(self) -> int:
        """Tokens that chunks compute, or a stored prefix gives: the last one is left to a decode step."""
        return (self.num_prompt_tokens if self.redecodes else self.num_tokens) - 1

    @property
    def num_to_prefill(self) -> int:
        """Tokens to compute before the next decode step."""
        return max(0, self.prefill_end - self.num_computed)

    @property
    def is_prefilling(self) -> bool:
        return self.prefill_end > self.num_computed

    @property
    def will_store_prefix(self) -> bool:
        """Parts of its prompt are computed, or about to be, that the prefix cache does not have yet."""
        return self.is_prefilling or self.num_chunks_pending > 0

    @property
    def wants_token(self) -> bool:
        """Ready to decode: all but the last token computed, and the budget of completion tokens not used up."""
        return not self.is_prefilling and self.num_sampled < self.request.max_tokens

    @property
    def is_repeating(self) -> bool:
        """The decode step planned last computes a token behind which another is known: it samples nothing."""
        return self.num_computed < len(self.tokens)

    @property
    def cache_key(self) -> tuple[int, ...]:
        """Key of all known tokens; media positions hold content numbers."""
        return self.request.prompt.cache_key + tuple(self.tokens[self.num_prompt_tokens :])

    def move(self, status: Status) -> None:
        if (self.status, status) not in _LEGAL:
            raise AssertionError(f"sequence {self.id}: {self.status.value} -> {status.value} is not a legal change")
        self.status = status

    def reset_progress(self) -> None:
        """Back to nothing computed; pending tokens are lost and will be sampled again, to the same values."""
        self.num_computed = 0
        self.num_pending = 0
        self.num_chunks_pending = 0
        self.num_inserted = 0
        self.checkpoints = None

    def usage(self) -> Usage:
        report = self.cache_report
        return Usage(self.num_prompt_tokens, self.num_completion_tokens, report.num_cached_tokens if report else 0)

    def timings(self, finished: float | None = None) -> Timings:
        return Timings(self.arrived, self.admitted, self.first_token, finished)


@dataclass(frozen=True, slots=True)
class Committed:
    """What one commit did to a sequence."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
