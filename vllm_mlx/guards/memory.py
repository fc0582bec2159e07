"""Judge of memory: a sample in, a verdict out, and what follows from it for new requests.

    normal ──► elevated (warn threshold)  idle cache is dropped, a warning is logged
           ──► critical (limit threshold) also the action: warn, reduce-context, or reject-new

A level is left only some percent below where it was entered. Running requests are never ended. `MemoryMonitor.tick` is
called every few seconds by whoever owns the clock; it reads the sample and calls the effects. No MLX: the device's
numbers are handed in. Event loop; the properties may be read from any thread.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from vllm_mlx.errors import ModelLoadError

log = logging.getLogger(__name__)

GIB = 2**30
HYSTERESIS_PERCENT = 3.0
CONTEXT_FACTOR = 0.5
TREND_SAMPLES = 12
TREND_BYTES = 256 << 20


class Level(StrEnum):
    NORMAL = "normal"
    ELEVATED = "elevated"
    CRITICAL = "critical"


@dataclass(frozen=True, slots=True)
class MemorySample:
    """One reading. The device's part is None where the process's bytes hold it already (CPU).

    On Apple Silicon both are given: the footprint against the machine, and Metal's bytes against its working set; the
    fuller one counts.
    """

    process_bytes: int
    process_capacity_bytes: int
    device_bytes: int | None = None
    device_capacity_bytes: int | None = None
    reclaimable_bytes: int = 0

    @property
    def percent(self) -> float:
        """Fill of the fuller of the two."""
        return max(self._process_percent, self._device_percent)

    def excess_bytes(self, percent: float) -> int:
        """Bytes to give up to come down to `percent`; 0 or less when below."""
        used, capacity = self.process_bytes, self.process_capacity_bytes
        if self._device_percent > self._process_percent and self.device_bytes and self.device_capacity_bytes:
            used, capacity = self.device_bytes, self.device_capacity_bytes
        return int(used - capacity * percent / 100)

    @property
    def _process_percent(self) -> float:
        return 100 * self.process_bytes / self.process_capacity_bytes if self.process_capacity_bytes else 0.0

    @property
    def _device_percent(self) -> float:
        if not self.device_bytes or not self.device_capacity_bytes:
            return 0.0
        return 100 * self.device_bytes / self.device_capacity_bytes


@dataclass
class MemoryGuard:
    """Thresholds in percent. `action` is taken while the level is critical."""

    warn_percent: float = 70.0
    limit_percent: float = 85.0
    action: str = "warn"
    level: Level = Level.NORMAL
    sample: MemorySample | None = None
    num_elevated: int = 0
    num_critical: int = 0
    _history: deque[int] = field(default_factory=lambda: deque(maxlen=TREND_SAMPLES))

    def observe(self, sample: MemorySample) -> Level:
        """Take in a reading; returns the level it leads to."""
        before, self.sample = self.level, sample
        self._history.append(max(sample.process_bytes, sample.device_bytes or 0))
        self.level = self._level(sample.percent)
        if self.level is not before:
            if self.level is Level.CRITICAL:
                self.num_critical += 1
            elif self.level is Level.ELEVATED and before is Level.NORMAL:
                self.num_elevated += 1
            log.log(
                logging.INFO if self.level is Level.NORMAL else logging.WARNING,
                "memory is %s: %s", self.level, self._describe(),
            )
        return self.level

    def _level(self, percent: float) -> Level:
        """Entered at the threshold, left some percent below it."""
        slack_critical = HYSTERESIS_PERCENT if self.level is Level.CRITICAL else 0.0
        slack_warn = HYSTERESIS_PERCENT if self.level is not Level.NORMAL else 0.0
        if percent >= self.limit_percent - slack_critical:
            return Level.CRITICAL
        if percent >= self.warn_percent - slack_warn:
            return Level.ELEVATED
        return Level.NORMAL

    # ── what follows ────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def rejects_new(self) -> bool:
        return self.level is Level.CRITICAL and self.action == "reject-new"

    def context_tokens(self, full: int) -> int | None:
        """Context for new requests while it is reduced; None when it is not."""
        if self.level is Level.CRITICAL and self.action == "reduce-context":
            return max(1, int(full * CONTEXT_FACTOR))
        return None

    @property
    def reason(self) -> str:
        """A clause that completes "... because <reason>"; empty while memory is normal."""
        if self.level is Level.NORMAL or self.sample is None:
            return ""
        threshold = self.limit_percent if self.level is Level.CRITICAL else self.warn_percent
        flag = "--memory-limit-threshold" if self.level is Level.CRITICAL else "--memory-warn-threshold"
        return f"memory is {self._describe()}, over {flag} {threshold:g}"

    @property
    def trend(self) -> str:
        """Over the last readings: rising, falling or steady; unknown with fewer than two."""
        if len(self._history) < 2:
            return "unknown"
        change = self._history[-1] - self._history[0]
        return "rising" if change > TREND_BYTES else "falling" if change < -TREND_BYTES else "steady"

    def _describe(self) -> str:
        sample = self.sample
        assert sample is not None
        text = f"{sample.percent:.0f} % full ({sample.process_bytes / GIB:.2f} GiB held by the process"
        if sample.device_bytes is not None:
            text += f", {sample.device_bytes / GIB:.2f} GiB on the device"
        return f"{text}, {sample.process_capacity_bytes / GIB:.1f} GiB to be had)"

    def report(self) -> dict[str, object]:
        """State for /health/diagnostics and /v1/status."""
        sample = self.sample
        return {
            "pressure": self.level.value if sample else "unknown",
            "utilization_pct": round(sample.percent, 1) if sample else None,
            "trend": self.trend,
            "process_bytes": sample.process_bytes if sample else None,
            "process_capacity_bytes": sample.process_capacity_bytes if sample else None,
            "device_bytes": sample.device_bytes if sample else None,
            "device_capacity_bytes": sample.device_capacity_bytes if sample else None,
            "warn_threshold_pct": self.warn_percent,
            "limit_threshold_pct": self.limit_percent,
            "action": self.action,
            "context_factor": CONTEXT_FACTOR if self.context_tokens(2) is not None else 1.0,
            "rejects_new": self.rejects_new,
            "times_elevated": self.num_elevated,
            "times_critical": self.num_critical,
        }


@dataclass
class MemoryMonitor:
    """Reads, judges and acts, once a tick.

    `evict` is asked for a number of bytes of idle prefix cache; it may only post the wish to the MLX thread.
    """

    guard: MemoryGuard
    read: Callable[[], MemorySample]
    evict: Callable[[int], None] = lambda num_bytes: None
    interval_s: float = 5.0
    num_evictions_asked: int = 0
    _last: float | None = None

    def tick(self, now: float) -> Level:
        """Read now unless the last reading is younger than the interval; returns the level."""
        if self._last is not None and now - self._last < self.interval_s:
            return self.guard.level
        self._last = now
        sample = self.read()
        level = self.guard.observe(sample)
        if level is not Level.NORMAL and sample.reclaimable_bytes > 0:
            target = self.guard.warn_percent - HYSTERESIS_PERCENT
            wanted = min(sample.excess_bytes(target), sample.reclaimable_bytes)
            if wanted > 0:
                self.num_evictions_asked += 1
                self.evict(wanted)
        return level


def check_weights(weights_bytes: int, capacity_bytes: int, limit_percent: float) -> None:
    """Raise when the weights alone would pass the limit: every request would be met at critical, for ever."""
    allowed = capacity_bytes * limit_percent / 100
    if weights_bytes > allowed:
        raise ModelLoadError(
            f"The weights take {weights_bytes / GIB:.1f} GiB, more than {limit_percent:g} % (--memory-limit-threshold) "
            f"of the {capacity_bytes / GIB:.1f} GiB this machine can give ({allowed / GIB:.1f} GiB). Use a smaller or "
            "more strongly quantised model, free memory, or raise the threshold."
        )
