"""What became of each generation: timed from its arrival, told once at its end to the log, the metrics and the traces.

Keeps the last ones and the last errors for the dashboard. A leaf that knows no server: it is told values. No prompt or
answer text passes through here. Used on the asyncio thread.
"""

from __future__ import annotations

import logging
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

log = logging.getLogger("vllm_mlx.requests")

NUM_FINISHED_KEPT = 200
NUM_ERRORS_KEPT = 100
NUM_REASONS_KEPT = 50
FAILED = frozenset({"error", "deadline"})


class FinishedUsage(Protocol):
    """What is counted of a finished generation."""

    @property
    def num_prompt_tokens(self) -> int: ...
    @property
    def num_completion_tokens(self) -> int: ...
    @property
    def num_cached_tokens(self) -> int: ...
    @property
    def num_reasoning_tokens(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RequestFacts:
    """What is known of a generation before it begins. `id` is the answer's, `request_id` the HTTP request's.

    `traceparent` is the header of that name, by which a trace goes on from the caller's.
    """

    id: str
    request_id: str = ""
    route: str = ""
    model: str = ""
    client: str = ""
    session: str = ""
    is_stream: bool = False
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """One generation, over. Times are in seconds; None for a point that was not reached. `ended` is `time.time()`.

    `reason` is a finish reason, or `unfinished` when no final event came (an error before it, a client that left).
    """

    facts: RequestFacts
    reason: str
    ended: float
    total_s: float
    ttft_s: float | None = None
    prepare_s: float | None = None
    queue_s: float | None = None
    prefill_s: float | None = None
    decode_s: float | None = None
    num_prompt_tokens: int = 0
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    max_tokens: int | None = None
    miss_reason: str | None = None
    error: str | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first one."""
        if self.ttft_s is None or self.num_completion_tokens < 2 or self.total_s <= self.ttft_s:
            return None
        return (self.num_completion_tokens - 1) / (self.total_s - self.ttft_s)

    def as_dict(self) -> dict[str, Any]:
        """Flat, for log lines and JSON; what is not known is left out."""
        facts = self.facts
        rate = self.tokens_per_second
        known = {
            "id": facts.id, "request_id": facts.request_id, "route": facts.route, "model": facts.model,
            "client": facts.client, "session": facts.session or None, "stream": facts.is_stream,
            "reason": self.reason, "ended": round(self.ended, 3), "total_s": _ms(self.total_s),
            "ttft_s": _ms(self.ttft_s), "queue_s": _ms(self.queue_s), "prefill_s": _ms(self.prefill_s),
            "decode_s": _ms(self.decode_s), "tokens_per_second": None if rate is None else round(rate, 2),
            "prompt_tokens": self.num_prompt_tokens, "completion_tokens": self.num_completion_tokens,
            "cached_tokens": self.num_cached_tokens, "reasoning_tokens": self.num_reasoning_tokens,
            "miss_reason": self.miss_reason, "error": self.error,
        }  # fmt: skip
        return {name: value for name, value in known.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that went wrong: an HTTP error, a generation that failed, a warning of the log. `ended` as above."""

    time: float
    source: str
    message: str
    request_id: str = ""


class Journal:
    """`observers` are told of each finished generation; `on_gap` (set by the metrics) of each inter-token gap."""

    def __init__(self) -> None:
        self.finished: deque[FinishedRequest] = deque(maxlen=NUM_FINISHED_KEPT)
        self.problems: deque[Problem] = deque(maxlen=NUM_ERRORS_KEPT)
        self.miss_reasons: Counter[str] = Counter()
        self.num_finished = 0
        self.num_problems = 0
        self.observers: list[Callable[[FinishedRequest], None]] = []
        self.on_gap: Callable[[str, float], None] = lambda model, seconds: None

    def start(self, facts: RequestFacts) -> RequestTimer:
        return RequestTimer(self, facts)

    def note(self, request: FinishedRequest) -> None:
        """A generation is over."""
        self.finished.append(request)
        self.num_finished += 1
        if request.miss_reason and (reason := _kind(request.miss_reason)) is not None:
            if reason in self.miss_reasons or len(self.miss_reasons) < NUM_REASONS_KEPT:
                self.miss_reasons[reason] += 1
        if request.reason in FAILED:
            self.add_problem(f"generation: {request.reason}", request.error or request.reason, request.facts.request_id)
        # One that never began has the access line already (api/access.py), with the reason.
        level = logging.DEBUG if request.reason == "unfinished" else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, _sentence(request), extra=request.as_dict())
        for observer in self.observers:
            observer(request)

    def add_problem(self, source: str, message: str, request_id: str = "") -> None:
        self.problems.append(Problem(time.time(), source, message, request_id))
        self.num_problems += 1


class ProblemHandler(logging.Handler):
    """Log lines of warning and above become problems of a journal, wherever in the program they come from."""

    def __init__(self, journal: Journal) -> None:
        super().__init__(logging.WARNING)
        self._journal = journal

    def emit(self, record: logging.LogRecord) -> None:
        self._journal.add_problem(f"log: {record.name.removeprefix('vllm_mlx.')}", record.getMessage())


class RequestTimer:
    """Times one generation from its arrival. Told of its outputs, its end, or (by `close`) that none came."""

    __slots__ = ("_facts", "_first", "_is_done", "_journal", "_last", "_started")

    def __init__(self, journal: Journal, facts: RequestFacts) -> None:
        self._journal = journal
        self._facts = facts
        self._started = time.monotonic()
        self._first: float | None = None
        self._last = 0.0
        self._is_done = False

    def output(self) -> None:
        """A piece of the answer is on its way to the client."""
        now = time.monotonic()
        if self._first is None:
            self._first = now
        else:
            self._journal.on_gap(self._facts.model, now - self._last)
        self._last = now

    def finished(
        self, reason: str, usage: FinishedUsage, diagnostics: Mapping[str, Any], error: str | None = None
    ) -> None:
        """`diagnostics` are `generation.diagnostics.describe`'s."""
        self._is_done = True
        now = time.monotonic()
        timings = diagnostics.get("timings_ms", {})
        self._journal.note(
            FinishedRequest(
                self._facts, reason, time.time(), now - self._started,
                ttft_s=None if self._first is None else self._first - self._started,
                prepare_s=_seconds(timings.get("prepare")),
                queue_s=_seconds(timings.get("queue")),
                prefill_s=_seconds(timings.get("prefill")),
                decode_s=_seconds(timings.get("decode")),
                num_prompt_tokens=usage.num_prompt_tokens,
                num_completion_tokens=usage.num_completion_tokens,
                num_cached_tokens=usage.num_cached_tokens,
                num_reasoning_tokens=usage.num_reasoning_tokens,
                max_tokens=diagnostics.get("max_tokens"),
                miss_reason=diagnostics.get("cache", {}).get("miss_reason"),
                error=error,
            )  # fmt: skip
        )

    def close(self) -> None:
        """The generation is over; without a final event it counts as unfinished."""
        if not self._is_done:
            self._is_done = True
            total_s = time.monotonic() - self._started
            self._journal.note(FinishedRequest(self._facts, "unfinished", time.time(), total_s))


def _sentence(request: FinishedRequest) -> str:
    parts = [
        f"{request.facts.id} {request.reason}:",
        f"{request.num_prompt_tokens} ({request.num_cached_tokens} cached) + {request.num_completion_tokens} tokens",
        f"in {request.total_s:.2f} s",
    ]
    if request.ttft_s is not None:
        parts.append(f"(first after {request.ttft_s:.3f} s")
        rate = request.tokens_per_second
        parts[-1] += f", then {rate:.1f}/s)" if rate else ")"
    return " ".join(parts)


def _kind(reason: str) -> str | None:
    """A reason without its numbers, so that equal ones can be counted."""
    return re.sub(r"\d+", "N", reason) or None


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
