"""Server-sent events: framing, disconnect → cancel, slow readers, errors after the headers. Pure ASGI, asyncio thread.

The whole of a generation's iterator is driven by the request's own task, so that time-outs and permits held inside it
are entered and left in one task. What watches the client is a second, small task.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Generic, Protocol, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from vllm_mlx.api.errors import ErrorAnswer, describe
from vllm_mlx.errors import Cancelled, VllmMlxError
from vllm_mlx.generation.events import KeepAlive

log = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"
STALL_TIMEOUT_S = 60.0
"""How long a client may read nothing before its request is cancelled."""


E = TypeVar("E")
E_contra = TypeVar("E_contra", contravariant=True)


def keep_alive(event: KeepAlive) -> bytes:
    """A comment, which clients skip and people read: what the request waits for, and for how long."""
    facts = ""
    if event.queue_position is not None:
        facts = f" waiting, {event.queue_position} ahead"
        if event.predicted_wait_s is not None:
            facts += f", about {event.predicted_wait_s:.0f} s"
    elif event.phase == "prefill" and event.num_prompt_tokens:
        facts = f" prefill, {event.num_computed_tokens} of {event.num_prompt_tokens} tokens"
    return f": keep-alive{facts}\n\n".encode()


class Renderer(Protocol[E_contra]):
    """Turns events into the bytes of one protocol's stream. Holds the state of one answer; never waits."""

    def render(self, index: int, event: E_contra) -> bytes:
        """Bytes for an event of choice `index`; empty when there is nothing to show yet."""
        ...

    def failed(self, answer: ErrorAnswer) -> bytes:
        """Bytes that end a stream which cannot be continued."""
        ...


class ClientGone(Cancelled):
    """The client closed its connection; nobody reads the answer."""


@asynccontextmanager
async def watch_client(receive: Receive) -> AsyncIterator[None]:
    """Inside the block a disconnect cancels what runs, and the block raises `ClientGone`.

    Nothing here awaits after the block's body has ended, so a late disconnect cannot cancel what follows it.
    """
    task = asyncio.current_task()
    assert task is not None
    is_gone = False

    async def watch() -> None:
        nonlocal is_gone
        while (await receive())["type"] != "http.disconnect":
            pass
        is_gone = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        if not is_gone:
            raise
        task.uncancel()
        raise ClientGone("The client closed the connection.") from None
    finally:
        watcher.cancel()


class EventStream(Response, Generic[E]):
    """A streamed answer: `events` are rendered and sent as they come.

    `events` is already open: its first error was raised before this object was made, so the status is 200 here.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[tuple[int, E], None],
        renderer: Renderer[E],
        *,
        media_type: str | None = None,
        stall_timeout_s: float | None = None,
    ) -> None:
        # A proxy that buffers would turn a stream into one late block.
        headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
        super().__init__(headers=headers, media_type=media_type)
        del self.headers["content-length"]
        self._events = events
        self._renderer = renderer
        self._stall_timeout_s = STALL_TIMEOUT_S if stall_timeout_s is None else stall_timeout_s
        self._sending_since: float | None = None
        self._is_stalled = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        assert task is not None
        watchdog = asyncio.create_task(self._watch_stall(task))
        try:
            async with aclosing(self._events), watch_client(receive):
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await self._pump(send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientGone:
            log.debug("the client left %s", scope["path"])
        except asyncio.CancelledError:
            if not self._is_stalled:
                raise
            task.uncancel()
            log.warning("a client read nothing of %s for %g s; its request ends", scope["path"], self._stall_timeout_s)
        finally:
            watchdog.cancel()

    async def _watch_stall(self, task: asyncio.Task[object]) -> None:
        """Cancel the stream when one send has waited for the stall time: the client reads nothing."""
        loop = asyncio.get_running_loop()
        while not self._is_stalled:
            await asyncio.sleep(self._stall_timeout_s / 4)
            if self._sending_since is not None and loop.time() - self._sending_since > self._stall_timeout_s:
                self._is_stalled = True
                task.cancel()

    async def _pump(self, send: Send) -> None:
        loop, render = asyncio.get_running_loop(), self._renderer.render

        async def write(data: bytes) -> None:
            self._sending_since = loop.time()
            await send({"type": "http.response.body", "body": data, "more_body": True})
            self._sending_since = None

        try:
            async for index, event in self._events:
                if data := render(index, event):
                    await write(data)
        except Exception as error:  # The request boundary: after the headers, an error is an event.
            if not isinstance(error, VllmMlxError):
                log.exception("a stream failed")
            await write(self._renderer.failed(describe(error)))
