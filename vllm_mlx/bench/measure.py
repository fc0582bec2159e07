"""From the times of single answers to the numbers of a run. Pure; no clocks."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Trace:
    """One answer. `stamps` are the times at which a piece of content had arrived (seconds, any clock).

    Token counts are the server's own; one that reports none is counted by events. `tokens` are the answer's, as text,
    where log-probabilities were asked for.
    """

    started: float
    ended: float
    stamps: list[float] = field(default_factory=list)
    num_prompt_tokens: int | None = None
    num_completion_tokens: int | None = None
    num_cached_tokens: int = 0
    text: str = ""
    tokens: list[str] = field(default_factory=list)
    turn: int = 0
    error: str | None = None
    is_counted_by_events: bool = False
    is_complete: bool = False

    @property
    def ttft_ms(self) -> float:
        return (self.stamps[0] - self.started) * 1000


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float | None
    p95: float | None
    p99: float | None

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        ordered = sorted(values)
        return cls(*(percentile(ordered, q) for q in (0.50, 0.95, 0.99)))


@dataclass(frozen=True, slots=True)
class Summary:
    """One run of one workload on one target.

    `tokens_per_s`: all completion tokens by the time from the first request sent to the last byte. `itl_ms`: gaps
    between pieces of content (a server that joins tokens has fewer, longer ones); `tpot_ms`: a request's mean time per
    token after the first. `ttft_by_turn_ms`: medians, for conversations. `cpu_ms_per_token`: processor time of the
    target's process, which a busy machine changes little; None where it cannot be read.
    """

    num_ok: int
    num_failed: int
    first_error: str | None
    num_prompt_tokens: int
    num_cached_tokens: int
    num_completion_tokens: int
    wall_s: float
    tokens_per_s: float
    ttft_ms: Percentiles
    itl_ms: Percentiles
    tpot_ms: Percentiles
    ttft_by_turn_ms: tuple[float, ...]
    cpu_ms_per_token: float | None = None


def percentile(ordered: Sequence[float], q: float) -> float | None:
    """Nearest rank of sorted values; None when there are none."""
    if not ordered:
        return None
    return round(ordered[min(len(ordered) - 1, int(q * (len(ordered) - 1) + 0.5))], 3)


def summarize(traces: Sequence[Trace], cpu_s: float | None = None) -> Summary:
    good = [t for t in traces if t.error is None and t.stamps]
    bad = [t for t in traces if t.error is not None or not t.stamps]
    wall = max(t.ended for t in good) - min(t.started for t in good) if good else 0.0
    completion = sum(t.num_completion_tokens or 0 for t in good)
    turns = sorted({t.turn for t in good})
    return Summary(
        num_ok=len(good),
        num_failed=len(bad),
        first_error=bad[0].error if bad else None,
        num_prompt_tokens=sum(t.num_prompt_tokens or 0 for t in good),
        num_cached_tokens=sum(t.num_cached_tokens for t in good),
        num_completion_tokens=completion,
        wall_s=round(wall, 4),
        tokens_per_s=round(completion / wall, 2) if wall else 0.0,
        ttft_ms=Percentiles.of(t.ttft_ms for t in good),
        itl_ms=Percentiles.of(
            (later - earlier) * 1000 for t in good for earlier, later in zip(t.stamps, t.stamps[1:], strict=False)
        ),
        tpot_ms=Percentiles.of(
            (t.stamps[-1] - t.stamps[0]) * 1000 / (t.num_completion_tokens - 1)
            for t in good
            if t.num_completion_tokens and t.num_completion_tokens > 1
        ),
        ttft_by_turn_ms=tuple(
            round(statistics.median(t.ttft_ms for t in good if t.turn == turn), 2) for turn in turns
        )
        if len(turns) > 1
        else (),
        cpu_ms_per_token=round(cpu_s * 1000 / completion, 3) if cpu_s is not None and completion else None,
    )
