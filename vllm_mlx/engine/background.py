"""A thread that runs jobs one after the other, and tells who waits when one is done. No MLX."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

log = logging.getLogger(__name__)


class Background(Protocol):
    """Where jobs run that may wait for a disk. A simulation runs them when it likes."""

    def submit(self, job: Callable[[], None]) -> None: ...

    def notify(self) -> None:
        """There is news for whoever waits."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Return at the next news, or when the time has passed."""
        ...

    def pause(self, seconds: float) -> None:
        """Called by a job: rest, so as not to take the whole disk."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Run what was submitted, then end; False if that took longer. Nothing may be submitted afterwards."""
        ...


class Worker:
    """One daemon thread. `on_news` is called, on it, after each job: to wake a thread that sleeps elsewhere."""

    def __init__(self, name: str) -> None:
        self.on_news: Callable[[], object] = _nothing
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._news = threading.Event()
        self._is_closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        if not self._is_closing.is_set():
            self._jobs.put(job)

    def notify(self) -> None:
        self._news.set()
        self.on_news()

    def wait(self, timeout_s: float) -> None:
        self._news.wait(timeout_s)
        self._news.clear()

    def pause(self, seconds: float) -> None:
        self._is_closing.wait(seconds)

    def close(self, timeout_s: float) -> bool:
        until = time.monotonic() + timeout_s
        self._is_closing.set()
        self._jobs.put(None)
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception:  # the job's boundary: a job that fails must not end the thread
                log.exception("a job of the %s failed", threading.current_thread().name)
            self.notify()


def _nothing() -> None:
    """Nobody sleeps."""
