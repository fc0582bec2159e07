"""What passes between scheduler, runner and the world outside: frozen, plain data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class FinishReason(StrEnum):
    """Why a sequence ended, in the engine's words; protocols translate."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    REPETITION = "repetition"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities (natural log, before temperature) of a token and of the most likely ones at its position."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Timings:
    """`time.monotonic()` seconds; None for a point not reached."""

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    finished: float | None = None


@dataclass(frozen=True, slots=True)
class CacheReport:
    """What the prefix cache gave a request, and why it did not give more."""

    num_cached_tokens: int = 0
    num_matched_tokens: int = 0
    miss_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Usage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """New tokens of one request. The last event of a request, and only that one, has a `finish_reason`.

    A stop token that ended the sequence is in `token_ids` (it counts as a completion token) and is the
    `stop_token_id`; generation leaves it out of the text. `detail` is a sentence with FinishReason.ERROR.
    `prompt_logprobs`, on the first event when the request asked for them: one for each prompt token but the first.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    detail: str | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    cache: CacheReport | None = None
    max_batch_rows: int = 1
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a request stands before its first token: for keep-alive comments and `/v1/status`."""

    request_id: str
    phase: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_completion_tokens: int
    max_tokens: int
    queue_position: int | None = None
    arrived: float = 0.0
    first_token: float | None = None
    num_cached_tokens: int = 0
    predicted_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """What the front may know of the engine; a fresh one is published after each step that changed anything."""

    is_healthy: bool = True
    failure: str | None = None
    num_waiting: int = 0
    num_running: int = 0
    num_steps: int = 0
    batch_rows: int = 0
    kv_bytes: int = 0
    kv_budget_bytes: int = 0
    prefix_cache_bytes: int = 0
    prefix_cache_budget_bytes: int = 0
    num_prefix_hits: int = 0
    num_prefix_misses: int = 0
    num_cached_tokens: int = 0
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_preemptions: int = 0
    num_evictions: int = 0
    num_prefix_diverged: int = 0
    num_without_checkpoint: int = 0
    num_failed_steps: int = 0
    requests: tuple[Progress, ...] = ()
    extra: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of one sequence, computed in one step.

    After the last chunk only the sequence's last token is left, which its first decode step computes. `keep_state`:
    the whole state after this chunk becomes a checkpoint.
    """

    request_id: str
    start: int
    end: int
    is_last: bool
    keep_state: bool = False


@dataclass(frozen=True, slots=True)
class StepPlan:
    """What one step computes: one decode token for each id in `decode`, and some prefill chunks.

    `draft_limits`, parallel to `decode`: how many drafted tokens may be verified behind each; empty for none at all.
    """

    decode: tuple[str, ...] = ()
    chunks: tuple[Chunk, ...] = ()
    draft_limits: tuple[int, ...] = ()

    @property
    def num_tokens(self) -> int:
        return len(self.decode) + sum(c.end - c.start for c in self.chunks)

    def __bool__(self) -> bool:
        return bool(self.decode or self.chunks)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The tokens a step produced for one sequence (one, or several after verified drafts).

    `prompt_logprobs` come with the first token, when the request asked for them.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a plan. `failures` maps request ids to a sentence; those sequences are ended."""

    sampled: tuple[Sampled, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)
