"""The guards of one served model, built from the settings and tied to engine, admission and health. Composition root.

The engine's part (loops, rows, replays) is attached on the MLX thread; the memory monitor ticks on the event loop, and
wakes the MLX thread so that an idle one may probe.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Any

from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.replay import Replayer, watch_rows
from vllm_mlx.engine.thread import EngineThread
from vllm_mlx.generation.admission import Pressure
from vllm_mlx.guards.divergence import DivergenceGuard, Verdict
from vllm_mlx.guards.memory import Level, MemoryGuard, MemoryMonitor, MemorySample
from vllm_mlx.guards.process_memory import capacity_bytes, process_bytes, return_to_system
from vllm_mlx.guards.repetition import RepetitionJudge
from vllm_mlx.guards.rows import RowGuard
from vllm_mlx.models import device
from vllm_mlx.settings import Settings

log = logging.getLogger(__name__)


class Oversight:
    """`context_tokens` is the context that is enforced while memory is not short."""

    def __init__(self, settings: Settings, context_tokens: int) -> None:
        guards, batch = settings.guards, settings.batch
        self._settings = guards
        self._context_tokens = context_tokens
        self.judge = RepetitionJudge()
        self.rows = RowGuard(batch.runtime_mode, batch.max_num_seqs, batch.runtime_mode_threshold)
        self.divergence = DivergenceGuard(guards.batch_divergence_threshold, guards.batch_divergence_action)
        self.memory = MemoryGuard(guards.memory_warn_threshold, guards.memory_limit_threshold, guards.memory_action)
        self._monitor = MemoryMonitor(self.memory, self._read, self._evict, guards.memory_monitor_interval)
        self._engine: Engine | None = None
        self._thread: EngineThread | None = None
        self._task: asyncio.Task[None] | None = None

    def attach(self, engine: Engine) -> Engine:
        """Put the guards to the engine. MLX thread, before its first step."""
        self._engine = engine
        replayer = None
        if self._settings.batch_divergence_monitor:
            replayer = Replayer(engine, self.divergence, interval_s=self._settings.batch_divergence_interval)
        watch_rows(engine, self.rows, replayer)
        engine.reports.append(lambda: {"repetition": self.judge.report()})
        return engine

    # ── event loop ──────────────────────────────────────────────────────────────────────────────────────────────

    def start(self, thread: EngineThread) -> None:
        """Watch until `stop`."""
        self._thread = thread
        self._task = asyncio.get_running_loop().create_task(self._watch(thread), name="memory monitor")
        self._task.add_done_callback(_log_failure)

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self, thread: EngineThread) -> None:
        while True:
            self._monitor.tick(time.monotonic())
            if self._settings.batch_divergence_monitor:
                thread.submit_job(_nothing)  # an idle thread sleeps; awake, it may find that a probe is due
            await asyncio.sleep(self._settings.memory_monitor_interval)

    def _read(self) -> MemorySample:
        report = device.report()
        is_apart = report.backend != "cpu"
        return MemorySample(
            process_bytes(),
            capacity_bytes(),
            report.active_bytes + report.cached_bytes if is_apart else None,
            device.capacity_bytes() if is_apart else None,
            reclaimable_bytes=self._thread.status.prefix_cache_bytes if self._thread else 0,
        )

    def _evict(self, num_bytes: int) -> None:
        """Ask the MLX thread to drop idle prefixes and give the memory back."""

        def evict() -> None:
            assert self._engine is not None
            if self._engine.scheduler.prefixes.cache is not None:
                freed = self._engine.scheduler.prefixes.cache.evict(num_bytes)
                device.release_cached()
                return_to_system()
                log.info("dropped %.0f MiB of idle prefix cache because memory is short", freed / 2**20)

        if self._thread is not None:
            self._thread.submit_job(evict)

    # ── for the front ───────────────────────────────────────────────────────────────────────────────────────────

    def pressure(self) -> Pressure:
        """What memory means for new requests."""
        guard = self.memory
        return Pressure(guard.rejects_new, guard.context_tokens(self._context_tokens), guard.reason)

    def health_checks(self) -> Mapping[str, Mapping[str, Any]]:
        """Entries of `/health/diagnostics`."""
        return {
            "memory": self._memory_check(),
            "batch_divergence": self._divergence_check(),
            "repetition": self._repetition_check(),
            "runtime_mode": _check("pass", f"at most {self.rows.limit} rows now", self.rows.report()),
            **self._disk_check(),
        }

    def _disk_check(self) -> Mapping[str, Any]:
        """Nothing where there is no disk cache; a warning while it is not used."""
        report = self._thread.status.extra.get("disk_cache") if self._thread else None
        if not isinstance(report, Mapping):
            return {}
        if report["fault"] is not None:
            return {"disk_cache": _check("warning", f"not used for now: {report['fault']}", report)}
        detail = f"{report['num_blocks']} blocks, {report['bytes'] / 2**30:.2f} GiB"
        return {"disk_cache": _check("pass", detail, report)}

    def _memory_check(self) -> Mapping[str, Any]:
        report = self.memory.report()
        if self.memory.level is Level.NORMAL:
            known = report["utilization_pct"]
            return _check("pass", "not measured yet" if known is None else f"{known} % full", report)
        return _check("warning", self.memory.reason, report)

    def _divergence_check(self) -> Mapping[str, Any]:
        report = {"enabled": self._settings.batch_divergence_monitor, **self.divergence.report()}
        if not self._settings.batch_divergence_monitor:
            return _check("pass", "not monitored (--batch-divergence-monitor)", report)
        if self.divergence.verdict is Verdict.UNKNOWN:
            return _check("unknown", "no request has been replayed yet", report)
        detail = f"agreement {self.divergence.agreement:.3f} over the last replays"
        return _check("pass" if self.divergence.verdict is Verdict.PASS else "warning", detail, report)

    def _repetition_check(self) -> Mapping[str, Any]:
        report = {"policy": self._settings.repetition_policy, **self.judge.report()}
        return _check("pass", f"{self.judge.interventions.total()} answers were ended in a loop", report)


def _check(status: str, detail: str, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {"status": status, "detail": detail, "metadata": dict(metadata)}


def _nothing() -> None:
    """A job that only wakes the thread."""


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the memory monitor ended", exc_info=error)
