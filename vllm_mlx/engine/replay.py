"""Replays finished greedy requests when the engine is idle, and hands both answers to the divergence guard.

While all is well, requests that were computed in a batch are replayed alone. While the guard serializes, everything is
computed alone, so it is the other way round: lone answers are replayed side by side. A probe holds the whole finished
`Request`, images included, and skips the prefix cache. It gives way to the first request that arrives. MLX thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.step import FinishReason
from vllm_mlx.guards.divergence import DivergenceGuard, compare
from vllm_mlx.guards.rows import RowGuard

NUM_SAMPLES = 8
MAX_TOKENS = 256
MAX_TRIES = 3
NUM_COMPANIONS = 3
_PROBE = "is_probe"


@dataclass(eq=False)
class Sample:
    """A finished greedy request and its first tokens. `rows`: most rows it was computed with."""

    request: Request
    tokens: list[int]
    rows: int
    num_tries: int = 0


@dataclass(frozen=True)
class Probe:
    sample: Sample
    request_id: str
    companion_ids: frozenset[str] = frozenset()

    @property
    def ids(self) -> frozenset[str]:
        return self.companion_ids | {self.request_id}


class Replayer:
    """Attaches itself to an engine. `interval_s`: least time between two probes."""

    def __init__(self, engine: Engine, guard: DivergenceGuard, *, interval_s: float) -> None:
        self.guard = guard
        self.interval_s = interval_s
        self._engine = engine
        self._samples: deque[Sample] = deque(maxlen=NUM_SAMPLES)
        self._probe: Probe | None = None
        self._num_started = 0
        self._last_end: float | None = None
        engine.on_idle.append(self.probe_if_due)
        engine.before_plan.append(self._give_way)
        engine.on_finished.append(self._finished)
        engine.reports.append(self.report)

    @property
    def num_probing(self) -> int:
        """Rows that the running probe wants; 0 without one."""
        return len(self._probe.ids) if self._probe else 0

    @property
    def serializes(self) -> bool:
        """Whether clients' requests must be computed one at a time now."""
        return self.guard.serializes

    def probe_if_due(self) -> bool:
        """Start a probe if the last one is long enough ago and there is a sample; True when there is now work to do."""
        is_due = self._last_end is None or self._engine.now() - self._last_end >= self.interval_s
        sample = self._next_sample() if is_due and self._probe is None else None
        if sample is None:
            return False
        sample.num_tries += 1
        self._start(sample)
        return True

    def report(self) -> Mapping[str, object]:
        return {"batch_divergence": {**self.guard.report(), "samples_kept": len(self._samples)}}

    # ── a probe's life ──────────────────────────────────────────────────────────────────────────────────────────

    def _next_sample(self) -> Sample | None:
        """The newest sample whose answer was made the way that is in question."""
        wants_lone = self.guard.serializes
        return next((s for s in reversed(self._samples) if (s.rows == 1) == wants_lone), None)

    def _start(self, sample: Sample) -> None:
        """Companions first: the sample's prompt is then computed last, and all its tokens beside theirs."""
        companions = []
        if sample.rows == 1:
            others = [s for s in self._samples if s is not sample][-NUM_COMPANIONS:] or [sample]
            for other in others:
                companions.append(self._copy(other, max(len(other.tokens), len(sample.tokens))))
        subject = self._copy(sample, len(sample.tokens))
        self._probe = Probe(sample, subject.id, frozenset(c.id for c in companions))
        for request in (*companions, subject):
            self._engine.submit(request)

    def _copy(self, sample: Sample, max_tokens: int) -> Request:
        self._num_started += 1
        request = sample.request
        return replace(
            request,
            id=f"probe-{self._num_started}",
            max_tokens=max_tokens,
            sampling=replace(request.sampling, num_logprobs=None),
            deadline=None,
            repetition_policy="off",
            num_prompt_logprobs=None,
            skips_prefix_cache=True,
            extra={**request.extra, _PROBE: True},
        )

    def _give_way(self, now: float) -> None:
        """End the probe when anybody else's request is here."""
        probe = self._probe
        if probe is not None and any(s.id not in probe.ids for s in self._engine.scheduler.all()):
            self.guard.interrupted()
            self._end(probe, keep=probe.sample.num_tries < MAX_TRIES)

    def _finished(self, sequence: Sequence) -> None:
        probe = self._probe
        if probe is not None and sequence.id == probe.request_id:
            self._judge(probe, sequence)
        elif _is_worth_replaying(sequence):
            tokens = sequence.tokens[sequence.num_prompt_tokens :][:MAX_TOKENS]
            self._samples.append(Sample(sequence.request, tokens, sequence.max_batch_rows))

    def _judge(self, probe: Probe, sequence: Sequence) -> None:
        sample, rows = probe.sample, sequence.max_batch_rows
        tokens = sequence.tokens[sequence.num_prompt_tokens :]
        self._end(probe, keep=False)
        if sequence.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
            self.guard.failed(sequence.detail or f"the replay ended with {sequence.finish_reason}")
        elif (rows == 1) == (sample.rows == 1):
            self.guard.failed(f"the replay was computed with {rows} rows, as the original was with {sample.rows}")
        else:
            batched, alone = (sample.tokens, tokens) if sample.rows > 1 else (tokens, sample.tokens)
            has_media = bool(sample.request.prompt.media)
            comparison = compare(sample.request.id, batched, alone, rows=max(rows, sample.rows), has_media=has_media)
            self.guard.observe(comparison)
            if self.guard.serializes:  # ask the same question again, now batched: recovery must pass where this failed
                self._samples.append(Sample(sample.request, alone, rows=1))

    def _end(self, probe: Probe, *, keep: bool) -> None:
        self._probe = None
        self._last_end = self._engine.now()
        if not keep and probe.sample in self._samples:
            self._samples.remove(probe.sample)
        for request_id in probe.ids:
            self._engine.cancel(request_id)


def watch_rows(engine: Engine, rows: RowGuard, replayer: Replayer | None = None) -> None:
    """Let `rows` set the scheduler's row limit before each plan; a probe gets the rows it wants."""
    if replayer is not None:
        rows.is_serialized = lambda: replayer.serializes

    def set_limit(now: float) -> None:
        scheduler = engine.scheduler
        num_probing = replayer.num_probing if replayer else 0
        num_live = len(scheduler.running) + len(scheduler.waiting) - num_probing
        scheduler.limits.max_rows = max(rows.judge(max(num_live, 0), now), num_probing)

    set_limit(engine.now())
    engine.before_plan.append(set_limit)
    engine.reports.append(lambda: {"rows": rows.report()})


def _is_worth_replaying(sequence: Sequence) -> bool:
    """A client's greedy request, not failed, and with enough tokens to say something."""
    request = sequence.request
    # An adapter may be gone by the time of the replay.
    if _PROBE in request.extra or request.adapter or not request.sampling.is_greedy:
        return False
    return sequence.finish_reason is not FinishReason.ERROR and sequence.num_completion_tokens > 1
