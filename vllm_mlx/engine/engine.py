"""The engine's turn: drain, plan, launch, commit, publish. Runs on the MLX thread, knows neither threads nor MLX.

Step n+1 is launched before the tokens of step n are handled, so the device works while the host does; where a row's
next token depends on its last one (grammar, thinking budget), the last step is finished first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from vllm_mlx.engine.request import Request
from vllm_mlx.engine.scheduler import KVStore, Scheduler
from vllm_mlx.engine.sequence import Committed, Sequence
from vllm_mlx.engine.step import EngineStatus, FinishReason, Progress, StepPlan, StepResult, TokenEvent

log = logging.getLogger(__name__)

# With more requests than this, the status tells of each one every so many seconds rather than at each step.
MANY_REQUESTS = 32
PROGRESS_S = 0.1

L = TypeVar("L", bound="Launched")

SHORT_PAUSE_S = 0.001
"""A job between two steps that is shorter than this is not noticed."""


class Launched(Protocol):
    """A step on its way through the device."""

    @property
    def plan(self) -> StepPlan: ...

    @property
    def allows_overlap(self) -> bool:
        """The next step may be launched before this one's tokens are known on the host."""
        ...


class Runner(KVStore, Protocol[L]):
    """Executes plans. `launch` starts the device and returns; `collect` waits for the tokens."""

    def launch(self, plan: StepPlan, sequences: Mapping[str, Sequence]) -> L: ...

    def collect(self, launched: L) -> StepResult: ...

    def reset(self) -> None:
        """Forget all rows, after a step that failed as a whole."""
        ...

    def metrics(self) -> Mapping[str, object]:
        """Numbers for `/health/diagnostics`, such as the bytes really held."""
        ...


Publish = Callable[[list[TokenEvent], EngineStatus], None]


@dataclass
class Pulse:
    """Health of the step loop: two failed steps with no token between them mean the engine is broken."""

    num_failures_in_a_row: int = 0
    failure: str | None = None

    def progress(self) -> None:
        self.num_failures_in_a_row = 0

    def failed(self, detail: str) -> None:
        self.num_failures_in_a_row += 1
        if self.num_failures_in_a_row >= 2:
            self.failure = detail


class Engine:
    """Owner of scheduler and runner; everything here happens on the thread that calls `step`.

    `before_plan` are called with the time before each plan and may change limits or cancel; `on_finished` are told of
    each ended sequence, `on_step` of each collected step that was not paused, with the seconds since the one before;
    `on_idle` when there is nothing to do, and say whether there now is; `on_sharing` hear before each step how many
    rows the thread's other engines decode. `on_stop` are called at the end. `reports` add to `EngineStatus.extra`.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner[Any],
        publish: Publish,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self._publish = publish
        self._clock = clock
        self._in_flight: Launched | None = None
        self._committed: list[Committed] = []
        self._pulse = Pulse()
        self.num_steps = 0
        self._last_collected = clock()
        self._paused_s = 0.0
        self._requests: tuple[float, tuple[Progress, ...]] = (0.0, ())
        self.before_plan: list[Callable[[float], None]] = []
        self.on_finished: list[Callable[[Sequence], None]] = []
        self.on_step: list[Callable[[StepPlan, float], None]] = []
        self.on_idle: list[Callable[[], bool]] = [scheduler.disk.idle]
        self.on_sharing: list[Callable[[int], None]] = []
        self.on_stop: list[Callable[[], object]] = []
        self.reports: list[Callable[[], Mapping[str, object]]] = [runner.metrics]

    # ── what the inbox may ask ──────────────────────────────────────────────────────────────────────────────────

    def submit(self, request: Request) -> None:
        """Take a request; from here to its final event it is the engine's."""
        if self._pulse.failure is not None:
            self._publish([_failed(request, self._pulse.failure)], self.status())
        elif self.scheduler.find(request.id) is not None:
            self._publish([_failed(request, "a request with this id is running")], self.status())
        else:
            self.scheduler.add(request, self._clock())

    def cancel(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        """End a request within this step, whatever its state; unknown and finished ids are ignored."""
        if (sequence := self.scheduler.find(request_id)) is not None:
            self.scheduler.finish(sequence, reason)

    def cancel_all(self, reason: FinishReason = FinishReason.CANCELLED) -> None:
        for sequence in list(self.scheduler.all()):
            self.scheduler.finish(sequence, reason)
        self._flush()

    def close(self) -> None:
        """After the last request: let who asked for it put things in order. An error there stops nobody else."""
        for callback in self.on_stop:
            try:
                callback()
            except Exception:  # logged: the other parts must stop too, and so must the thread
                log.exception("a part of the engine did not stop in order")

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting or self._in_flight or self.scheduler.has_ended)

    def idle(self) -> bool:
        """Offer an idle moment to who wants one (probes); True when there is now work to do."""
        return any(callback() for callback in self.on_idle)

    @property
    def num_decoding(self) -> int:
        return sum(not sequence.is_prefilling for sequence in self.scheduler.running.values())

    def share_thread(self, num_decoding_elsewhere: int) -> None:
        """Other engines step between two steps of this one, and decode so many rows."""
        for callback in self.on_sharing:
            callback(num_decoding_elsewhere)

    def now(self) -> float:
        return self._clock()

    def paused(self, seconds: float) -> None:
        """The thread has done something else for so long; no step is to be blamed for it."""
        self._paused_s += seconds

    # ── the turn ────────────────────────────────────────────────────────────────────────────────────────────────

    def step(self) -> None:
        """One turn: end what is overdue, launch the next step, handle the last one, tell the world."""
        now = self._clock()
        for sequence in self.scheduler.expired(now):
            self.scheduler.finish(sequence, FinishReason.DEADLINE)
        if self._in_flight is not None and not self._in_flight.allows_overlap:
            self._finish_step()
        for callback in self.before_plan:
            callback(now)
        plan = self.scheduler.plan(now)
        launched = self._launch(plan) if plan else None
        if launched is None and self._in_flight is None:
            self.scheduler.disk.rest()
        if not self._finish_step():
            launched = None  # it was built on the rows of the step that failed, and these are gone
        self._in_flight = launched
        self._flush()

    def _launch(self, plan: StepPlan) -> Launched | None:
        try:
            self.num_steps += 1
            return self.runner.launch(plan, self.scheduler.running)
        except Exception as error:  # the step boundary: whatever went wrong is answered and counted
            self._fail(plan, error)
            return None

    def _finish_step(self) -> bool:
        """Wait for the step in flight, if there is one, and commit it. False if it failed."""
        launched, self._in_flight = self._in_flight, None
        if launched is None:
            return True
        try:
            result = self.runner.collect(launched)
        except Exception as error:  # the step boundary
            self._fail(launched.plan, error)
            return False
        now = self._clock()
        elapsed_s, self._last_collected = now - self._last_collected, now
        paused_s, self._paused_s = self._paused_s, 0.0
        # The device may have done both at once; a step that shared its time tells nothing of what it costs.
        if paused_s < SHORT_PAUSE_S:
            for callback in self.on_step:
                callback(launched.plan, elapsed_s)
        self._committed += self.scheduler.commit(launched.plan, result, now)
        if result.sampled or launched.plan.chunks:
            self._pulse.progress()
        return True

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        log.exception("a step failed: its %d sequences end with an error, the others are recomputed", _size(plan))
        detail = f"{type(error).__name__}: {error}"
        self._in_flight = None
        self._pulse.failed(detail)
        self.scheduler.abandon({*plan.decode, *(chunk.request_id for chunk in plan.chunks)}, detail)
        self.runner.reset()
        if self._pulse.failure is not None:
            for sequence in list(self.scheduler.all()):
                self.scheduler.finish(sequence, FinishReason.ERROR, detail)

    # ── telling the world ───────────────────────────────────────────────────────────────────────────────────────

    def _flush(self) -> None:
        """Publish all events of this turn at once: tokens, and exactly one final event for each ended sequence."""
        committed, self._committed = self._committed, []
        events: dict[str, TokenEvent] = {
            c.sequence.id: TokenEvent(c.sequence.id, c.token_ids, c.logprobs, prompt_logprobs=c.prompt_logprobs)
            for c in committed
            if c.token_ids
        }
        now = self._clock()
        for sequence in self.scheduler.take_ended():
            last = events.get(sequence.id)
            events[sequence.id] = TokenEvent(
                sequence.id,
                last.token_ids if last else (),
                last.logprobs if last else (),
                sequence.finish_reason,
                sequence.stop_token_id,
                sequence.detail,
                sequence.usage(),
                sequence.timings(now),
                sequence.cache_report,
                sequence.max_batch_rows,
                last.prompt_logprobs if last else (),
            )
            for callback in self.on_finished:
                callback(sequence)
        self._publish(list(events.values()), self.status())

    def status(self) -> EngineStatus:
        """A frozen picture for the front, which never reads engine objects."""
        scheduler = self.scheduler
        cache, counters = scheduler.prefixes.cache, scheduler.counters
        stats = cache.counters if cache else None
        return EngineStatus(
            is_healthy=self._pulse.failure is None,
            failure=self._pulse.failure,
            num_waiting=len(scheduler.waiting),
            num_running=len(scheduler.running),
            num_steps=self.num_steps,
            batch_rows=len(self._in_flight.plan.decode) if self._in_flight else 0,
            kv_bytes=scheduler.kv_bytes,
            kv_budget_bytes=scheduler.limits.kv_budget_bytes,
            prefix_cache_bytes=cache.nbytes if cache else 0,
            prefix_cache_budget_bytes=cache.budget_bytes if cache else 0,
            num_prefix_hits=stats.num_hits if stats else 0,
            num_prefix_misses=stats.num_misses if stats else 0,
            num_cached_tokens=stats.num_cached_tokens if stats else 0,
            num_evictions=stats.num_evictions if stats else 0,
            num_prefix_diverged=stats.num_diverged if stats else 0,
            num_without_checkpoint=stats.num_without_checkpoint if stats else 0,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_completion_tokens=counters.num_completion_tokens,
            num_preemptions=counters.num_preemptions,
            num_failed_steps=counters.num_failed_steps,
            requests=self._progress(),
            extra={name: value for report in self.reports for name, value in report().items()},
        )


    def _progress(self) -> tuple[Progress, ...]:
        """Where each request stands. Of many, it is looked up a few times a second only: people read this."""
        scheduler, now = self.scheduler, self._clock()
        looked_at, requests = self._requests
        num = len(scheduler.running) + len(scheduler.waiting)
        if num <= MANY_REQUESTS or num != len(requests) or now - looked_at > PROGRESS_S:
            requests = tuple(
                _progress(scheduler.running.values(), scheduler.queue(), scheduler.queue_clock.predicted_wait_s)
            )
            self._requests = now, requests
        return requests


def _progress(
    running: Iterable[Sequence], waiting: Iterable[Sequence], predict: Callable[[int], float | None]
) -> Iterable[Progress]:
    for sequence in running:
        yield _describe(sequence, "prefill" if sequence.is_prefilling else "decode", None)
    for position, sequence in enumerate(waiting):
        phase = "waiting" if sequence.restore is None else "restore"
        yield _describe(sequence, phase, position, predict(position))


def _describe(
    sequence: Sequence, phase: str, queue_position: int | None, predicted_wait_s: float | None = None
) -> Progress:
    return Progress(
        sequence.id,
        phase,
        sequence.num_prompt_tokens,
        sequence.num_computed,
        sequence.num_completion_tokens,
        sequence.request.max_tokens,
        queue_position,
        sequence.arrived,
        sequence.first_token,
        sequence.cache_report.num_cached_tokens if sequence.cache_report else 0,
        predicted_wait_s,
    )


def _failed(request: Request, detail: str) -> TokenEvent:
    return TokenEvent(request.id, finish_reason=FinishReason.ERROR, detail=detail)


def _size(plan: StepPlan) -> int:
    return len(plan.decode) + len(plan.chunks)
