"""Token events of one request on their way from the engine's stream to the service. Event loop only.

A pump reads the engine's stream; the reader takes everything that has come, in one go, or nothing after a while. That
is how deltas coalesce under load, how keep-alives get their turn, and how a deadline holds even if the engine hangs.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any, cast

from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import TokenEvent
from vllm_mlx.generation.engine_port import EnginePort


class Mailbox:
    def __init__(self) -> None:
        self._events: list[TokenEvent] = []
        self._waiter: asyncio.Future[None] | None = None
        self.is_closed = False
        self.error: Exception | None = None

    def put(self, event: TokenEvent) -> None:
        self._events.append(event)
        self._wake()

    def close(self, error: Exception | None = None) -> None:
        """Nothing more will come."""
        self.is_closed = True
        self.error = error
        self._wake()

    async def take(self, timeout_s: float, *, at_most: int | None = None) -> list[TokenEvent]:
        """All events that are here (the oldest `at_most`), waiting for the first; empty after `timeout_s`, or when
        closed and empty."""
        if not self._events and not self.is_closed and timeout_s > 0:
            loop = asyncio.get_running_loop()
            self._waiter = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._waiter
            finally:
                timer.cancel()
                self._waiter = None
        count = len(self._events) if at_most is None else at_most
        events, self._events = self._events[:count], self._events[count:]
        return events

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


async def pump(engine: EnginePort, request: Request, mailbox: Mailbox) -> None:
    """Move the request's events into the mailbox until the last one. Cancelling this task cancels the request."""
    try:
        async with aclosing(cast(Any, engine.stream(request))) as events:
            async for event in events:
                mailbox.put(event)
    except Exception as error:  # handed to the reader, who answers for the request
        mailbox.close(error)
    else:
        mailbox.close()
