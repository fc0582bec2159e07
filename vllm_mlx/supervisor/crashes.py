"""How often the engine's process may crash. Pure: no process, no clock of its own."""

from __future__ import annotations

import signal
from collections import deque
from dataclasses import dataclass, field

MAX_CRASHES = 3
WINDOW_S = 60.0


@dataclass
class CrashLog:
    """Crashes so far. Too many within the window mean that starting again does not help."""

    max_crashes: int = MAX_CRASHES
    window_s: float = WINDOW_S
    num_crashes: int = 0
    last_cause: str | None = None
    _recent: deque[float] = field(default_factory=deque)

    def record(self, now: float, cause: str) -> bool:
        """Note a crash at `now` (seconds); whether to start again."""
        self.num_crashes += 1
        self.last_cause = cause
        self._recent.append(now)
        while now - self._recent[0] >= self.window_s:
            self._recent.popleft()
        return len(self._recent) < self.max_crashes


def cause_of(exit_code: int) -> str:
    """What ended a process, in words."""
    if exit_code >= 0:
        return f"it ended with exit code {exit_code}"
    try:
        return f"it was ended by {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"it was ended by signal {-exit_code}"
