"""Permits: how many requests may be in the house at once. Event loop only; nothing here waits for a permit.

A permit is held by an `async with` around a request's whole life, so it cannot leak. No permit left is `Overloaded`
with a guess of when one will be; memory pressure and shutdown are `Unavailable`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from vllm_mlx.errors import Overloaded, Unavailable


@dataclass(frozen=True, slots=True)
class Pressure:
    """What the memory guard says to the front: refuse new requests, or give them a smaller context. `reason` is a
    clause that completes "... because <reason>"."""

    rejects_new: bool = False
    context_tokens: int | None = None
    reason: str = ""


NO_PRESSURE = Pressure()


class Admission:
    """Bounds requests that run or wait together; several services (models) may share one."""

    def __init__(
        self,
        *,
        max_running: int,
        max_queue: int,
        pressure: Callable[[], Pressure] = lambda: NO_PRESSURE,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_running = max_running
        self._max_permits = max_running + max_queue
        self._pressure = pressure
        self._clock = clock
        self._num_held = 0
        self._num_refused = 0
        self._mean_held_s = 1.0
        self._is_draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_held(self) -> int:
        return self._num_held

    @property
    def num_refused(self) -> int:
        return self._num_refused

    @property
    def is_draining(self) -> bool:
        return self._is_draining

    @property
    def pressure(self) -> Pressure:
        return self._pressure()

    @asynccontextmanager
    async def permit(self) -> AsyncIterator[None]:
        """Take a permit now or raise; given back when the block is left, whatever the reason."""
        self._check()
        self._num_held += 1
        self._idle.clear()
        started = self._clock()
        try:
            yield
        finally:
            self._num_held -= 1
            self._mean_held_s += 0.1 * (self._clock() - started - self._mean_held_s)
            if self._num_held == 0:
                self._idle.set()

    def start_drain(self) -> None:
        """From now on nothing new is admitted (shutdown)."""
        self._is_draining = True

    async def drained(self, timeout_s: float | None = None) -> bool:
        """Wait until no permit is held; False when `timeout_s` passed first."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    def retry_after_s(self) -> float:
        """When a permit is likely to be free: the mean stay, shared by the rows that leave in that time."""
        return min(60.0, max(1.0, self._mean_held_s / max(1, self._max_running)))

    def _check(self) -> None:
        if self._is_draining:
            self._num_refused += 1
            raise Unavailable("The server is shutting down; try again when it is back.", retry_after_s=5.0)
        pressure = self._pressure()
        if pressure.rejects_new:
            self._num_refused += 1
            raise Unavailable(
                f"New requests are refused for the moment because {pressure.reason or 'memory is short'}; "
                "try again in a few seconds.",
                retry_after_s=5.0,
            )
        if self._num_held >= self._max_permits:
            self._num_refused += 1
            raise Overloaded(
                f"{self._num_held} requests are being served or waiting, which is the limit; try again shortly.",
                retry_after_s=self.retry_after_s(),
            )
