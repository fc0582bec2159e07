"""The MLX thread: the only file that knows both threads. Everything MLX is made, used and dropped on it.

    asyncio thread                         MLX thread
    stream()/cancel()/call() ── inbox ──►  drain ► Engine.step ► ...
    mailbox of each request  ◄── one call_soon_threadsafe a step ── publish
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm_mlx.engine.engine import Engine, Publish
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import EngineStatus, FinishReason, TokenEvent
from vllm_mlx.errors import EngineError, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request_id: str


@dataclass(frozen=True, slots=True)
class Call:
    """A one-shot job for the MLX thread, run between two steps."""

    job: Callable[[], Any]
    future: Future[Any]


@dataclass(frozen=True, slots=True)
class Stop:
    """End the thread; running requests get a final event first."""


Message = Submit | Cancel | Call | Stop


@dataclass(eq=False)
class Mailbox:
    """Events of one request on their way to its reader. Touched on the reader's event loop only."""

    loop: asyncio.AbstractEventLoop
    events: deque[TokenEvent] = field(default_factory=deque)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    def put(self, event: TokenEvent) -> None:
        self.events.append(event)
        self.arrived.set()

    async def get(self) -> TokenEvent:
        while not self.events:
            self.arrived.clear()
            await self.arrived.wait()
        return self.events.popleft()


class EngineThread:
    """Runs one engine. `build` is called on the thread and gives the engine; it may take long and may raise.

    When there is nothing to do, the engine's `idle` is called once, and again after each message: who wants it called
    later sends an empty job.
    """

    def __init__(self, build: Callable[[Publish], Engine]) -> None:
        self._build = build
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()
        self._status = EngineStatus(is_healthy=False, failure="the model is loading")
        self._ready: Future[None] = Future()
        self._is_stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)

    # ── from any thread ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Future[None]:
        """Start the thread; the future is done when the engine is built, or holds why it could not be."""
        self._thread.start()
        return self._ready

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End all requests and the thread. False if it is still busy after `timeout_s` (it is a daemon thread)."""
        self._inbox.put(Stop())
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._is_stopped.is_set()

    def cancel(self, request_id: str) -> None:
        """End a request at the next step boundary; unknown and finished ids are ignored."""
        self._inbox.put(Cancel(request_id))

    def submit_job(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the MLX thread between two steps."""
        future: Future[T] = Future()
        if self._is_stopped.is_set():
            future.set_exception(Unavailable("the engine has stopped"))
        else:
            self._inbox.put(Call(job, future))
        return future

    # ── from an event loop ──────────────────────────────────────────────────────────────────────────────────────

    async def call(self, job: Callable[[], T]) -> T:
        """Run `job` on the MLX thread between two steps, and wait for its result."""
        return await asyncio.wrap_future(self.submit_job(job))

    async def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submit and yield the request's events; the last has a finish reason. Leaving early cancels the request."""
        if self._is_stopped.is_set():
            raise Unavailable("the engine has stopped")
        mailbox = Mailbox(asyncio.get_running_loop())
        with self._lock:
            if request.id in self._mailboxes:
                raise EngineError(f"a request with id {request.id} is running")
            self._mailboxes[request.id] = mailbox
        is_finished = False
        try:
            self._inbox.put(Submit(request))
            if self._is_stopped.is_set():  # stopped since the first look: nobody may be reading the inbox any more
                raise Unavailable("the engine has stopped")
            while not is_finished:
                event = await mailbox.get()
                is_finished = event.finish_reason is not None
                yield event
        finally:
            with self._lock:
                self._mailboxes.pop(request.id, None)
            if not is_finished:
                self.cancel(request.id)

    # ── on the MLX thread ───────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        try:
            engine = self._build(self._deliver)
        except BaseException as error:  # handed to whoever waits for the start
            self._is_stopped.set()
            self._status = EngineStatus(is_healthy=False, failure=str(error))
            self._ready.set_exception(error)
            return
        self._status = engine.status()
        self._ready.set_result(None)
        try:
            while self._turn(engine):
                pass
        except Exception as error:  # a fault of the loop itself: nobody may be left waiting
            log.exception("the engine loop ended")
            self._status = EngineStatus(is_healthy=False, failure=f"{type(error).__name__}: {error}")
        finally:
            self._is_stopped.set()
            self._end_all(engine)

    def _turn(self, engine: Engine) -> bool:
        """Handle the inbox, then step; sleeps on the inbox when there is nothing to do. False after Stop."""
        if not engine.has_work and self._inbox.empty() and not engine.idle():
            if not self._handle(engine, self._inbox.get()):
                return False
        while not self._inbox.empty():
            if not self._handle(engine, self._inbox.get()):
                return False
        if engine.has_work:
            engine.step()
        return True

    def _handle(self, engine: Engine, message: Message) -> bool:
        match message:
            case Submit(request):
                engine.submit(request)
            case Cancel(request_id):
                engine.cancel(request_id)
            case Call(job, future):
                if future.set_running_or_notify_cancel():
                    try:
                        result = job()
                    except BaseException as error:  # belongs to whoever asked
                        future.set_exception(error)
                    else:
                        self._status = engine.status()  # who waited for the job sees what it changed
                        future.set_result(result)
            case Stop():
                engine.cancel_all()
                return False
        return True

    def _deliver(self, events: list[TokenEvent], status: EngineStatus) -> None:
        """All events of a step, with one wake-up for each event loop that reads any."""
        self._status = status
        if not events:
            return
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Mailbox, TokenEvent]]] = defaultdict(list)
        with self._lock:
            for event in events:
                if (mailbox := self._mailboxes.get(event.request_id)) is not None:
                    by_loop[mailbox.loop].append((mailbox, event))
        for loop, mail in by_loop.items():
            with contextlib.suppress(RuntimeError):  # the loop was closed: its readers are gone
                loop.call_soon_threadsafe(_put_all, mail)

    def _end_all(self, engine: Engine) -> None:
        """After the loop: every message and every reader still waiting is answered."""
        while not self._inbox.empty():
            match self._inbox.get():
                case Call(_, future):
                    future.set_exception(Unavailable("the engine has stopped"))
                case _:
                    pass
        detail = self._status.failure or "the server is shutting down"
        with self._lock:
            left = list(self._mailboxes)
        last = [TokenEvent(request_id, finish_reason=FinishReason.ERROR, detail=detail) for request_id in left]
        self._deliver(last, EngineStatus(is_healthy=False, failure=detail))


def _put_all(mail: list[tuple[Mailbox, TokenEvent]]) -> None:
    for mailbox, event in mail:
        mailbox.put(event)
