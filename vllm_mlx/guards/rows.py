"""Judge of the row limit: how many sequences may be computed together right now.

simple         always one
batched        always the most
auto           one, and the most as soon as `threshold` requests are here together; back to one after a quiet while
serialized     one, while the divergence guard says so

The smallest wins. A request counts from its arrival at the engine to its last token, so a stream counts for as long as
it runs. A lower limit never ends a running row; it only holds back the next. MLX thread; no MLX.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

QUIET_S = 60.0


@dataclass
class RowGuard:
    """`is_serialized` is asked each time. `quiet_s`: how long fewer than `threshold` requests must be here before
    `auto` narrows again."""

    mode: str
    max_rows: int
    threshold: int = 2
    quiet_s: float = QUIET_S
    is_serialized: Callable[[], bool] = lambda: False
    peak: int = 0
    num_widenings: int = 0
    limit: int = field(init=False)
    _last_busy: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("simple", "batched", "auto"):
            raise ValueError(f"unknown runtime mode {self.mode!r}")
        self.limit = self.max_rows if self.mode == "batched" else 1

    def judge(self, num_live: int, now: float) -> int:
        """The limit for the step to come, with `num_live` requests running or waiting."""
        self.peak = max(self.peak, num_live)
        wide = self.mode == "batched" or (self.mode == "auto" and self._is_busy(num_live, now))
        self.limit = self.max_rows if wide and not self.is_serialized() else 1
        return self.limit

    def _is_busy(self, num_live: int, now: float) -> bool:
        if num_live >= self.threshold:
            if self._last_busy is None:
                self.num_widenings += 1
            self._last_busy = now
        elif self._last_busy is not None and now - self._last_busy > self.quiet_s:
            self._last_busy = None
        return self._last_busy is not None

    def report(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "row_limit": self.limit,
            "max_rows": self.max_rows,
            "threshold": self.threshold,
            "peak_concurrency": self.peak,
            "times_widened": self.num_widenings,
            "serialized": self.is_serialized(),
        }
