"""The MLX thread: the only file that knows both threads. Everything MLX is made, used and dropped on it.

    asyncio thread                         MLX thread
    stream()/cancel()/call() ── inbox ──►  drain ► one Engine.step of each engine that has work ► ...
    mailbox of each request  ◄── one call_soon_threadsafe a step ── publish

`MlxThread` is the thread, with one inbox. `EngineThread` is one engine on it, as the other threads see it; by default
it has the thread to itself, and several may share one: they then step in turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from vllm_mlx.engine.engine import Publish
from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import EngineStatus, FinishReason, TokenEvent
from vllm_mlx.errors import EngineError, Unavailable

log = logging.getLogger(__name__)
T = TypeVar("T")

NO_PROC_DESTRUCTORS_S = 0.05
"""What a thread's destructors get where the system has no /proc to see them end."""


@dataclass(frozen=True, slots=True)
class Open:
    """Build the engine and take it into the turns."""


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
    """End the engine; running requests get a final event first."""


Message = Open | Submit | Cancel | Call | Stop


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


class Steps(Protocol):
    """What is stepped in turns: `Engine`, or `JobsOnly`."""

    @property
    def has_work(self) -> bool: ...
    @property
    def num_decoding(self) -> int: ...
    def idle(self) -> bool: ...
    def share_thread(self, num_decoding_elsewhere: int) -> None: ...
    def step(self) -> None: ...
    def submit(self, request: Request) -> None: ...
    def cancel(self, request_id: str) -> None: ...
    def cancel_all(self) -> None: ...
    def close(self) -> None: ...
    def now(self) -> float: ...
    def paused(self, seconds: float) -> None: ...
    def status(self) -> EngineStatus: ...


class MlxThread:
    """Runs engines in turns, for as long as there is one: it starts with the first and ends with the last.

    When there is nothing to do, the engines' `idle` is called, and again after each message and every `idle_again_s`:
    who wants it called sooner sends an empty job.
    """

    def __init__(self, idle_again_s: float = 30.0) -> None:
        self._idle_again_s = idle_again_s
        self._inbox: queue.SimpleQueue[tuple[EngineThread, Message]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # Under the lock: the newest thread, whether it takes messages, and the engines it has not let go of.
        self._thread: threading.Thread | None = None
        self._is_running = False
        self._engines: set[EngineThread] = set()

    # ── from any thread ─────────────────────────────────────────────────────────────────────────────────────────

    def open(self, engine: EngineThread) -> None:
        """Take an engine; it is built on the thread."""
        with self._lock:
            self._engines.add(engine)
            self._inbox.put((engine, Open()))
            if not self._is_running:
                self._is_running = True
                self._thread = threading.Thread(target=self._run, name="mlx", daemon=True)
                self._thread.start()

    def put(self, engine: EngineThread, message: Message) -> bool:
        """Send a message. False if there is no thread any more that could answer it."""
        with self._lock:
            if self._is_running:
                self._inbox.put((engine, message))
            return self._is_running

    def join(self, timeout_s: float) -> None:
        """Wait for the thread to be over, unless it still has an engine."""
        with self._lock:
            thread = self._thread if all(engine.has_ended for engine in self._engines) else None
        if thread is not None:
            thread.join(timeout_s)
            _await_destructors(thread, timeout_s)

    # ── on the thread ───────────────────────────────────────────────────────────────────────────────────────────

    def _run(self) -> None:
        engines: list[EngineThread] = []
        while True:
            if not any([engine.has_work for engine in engines]) and self._inbox.empty():
                if not any([engine.idle() for engine in engines]):
                    self._take(engines, self._idle_again_s)
            while not self._inbox.empty():
                self._take(engines)
            for engine in engines:
                engine.turn(sum(other.num_decoding for other in engines if other is not engine))
            ended = [engine for engine in engines if engine.has_ended]
            engines = [engine for engine in engines if not engine.has_ended]
            with self._lock:
                self._engines.difference_update(ended)
                if not self._engines and self._inbox.empty():
                    self._is_running = False
                    return

    def _take(self, engines: list[EngineThread], timeout_s: float | None = None) -> None:
        """Handle the next message; none when none comes within `timeout_s`."""
        try:
            engine, message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return
        if isinstance(message, Open):
            engines.append(engine)
        started = time.monotonic()
        engine.handle(message)
        if isinstance(message, (Open, Call)):
            # Loading a model, or another one's job: no step of the others is to be blamed for it.
            for other in engines:
                if other is not engine:
                    other.paused(time.monotonic() - started)


class EngineThread:
    """One engine on an MLX thread. `build` is called there and gives the engine; it may take long and may raise."""

    def __init__(self, build: Callable[[Publish], Steps], thread: MlxThread | None = None) -> None:
        self._build: Callable[[Publish], Steps] | None = build
        self._thread = thread or MlxThread()
        self._engine: Steps | None = None  # MLX thread only
        self._mailboxes: dict[str, Mailbox] = {}
        self._lock = threading.Lock()
        self._status = EngineStatus(is_healthy=False, failure="the model is loading")
        self._ready: Future[None] = Future()
        self._ended = threading.Event()

    # ── from any thread ─────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> Future[None]:
        """Start the engine; the future is done when it is built, or holds why it could not be."""
        self._thread.open(self)
        return self._ready

    def stop(self, timeout_s: float = 5.0) -> bool:
        """End all requests and the engine. False if it is still busy after `timeout_s` (the thread is a daemon)."""
        self._thread.put(self, Stop())
        is_over = self._ended.wait(timeout_s)
        if is_over:
            self._thread.join(timeout_s)
        return is_over

    @property
    def status(self) -> EngineStatus:
        return self._status

    @property
    def is_alive(self) -> bool:
        return self._ready.done() and not self._ended.is_set()

    def abandon(self, detail: str) -> None:
        """Answer everybody with an error and take nothing more, though the thread may be stuck for ever."""
        self._status = EngineStatus(is_healthy=False, failure=detail)
        self._ended.set()
        self._tell_all(detail)

    def cancel(self, request_id: str) -> None:
        """End a request at the next step boundary; unknown and finished ids are ignored."""
        self._thread.put(self, Cancel(request_id))

    def submit_job(self, job: Callable[[], T]) -> Future[T]:
        """Run `job` on the MLX thread between two steps."""
        future: Future[T] = Future()
        if not self._thread.put(self, Call(job, future)):
            future.set_exception(Unavailable("the engine has stopped"))
        return future

    # ── from an event loop ──────────────────────────────────────────────────────────────────────────────────────

    async def call(self, job: Callable[[], T]) -> T:
        """Run `job` on the MLX thread between two steps, and wait for its result."""
        return await asyncio.wrap_future(self.submit_job(job))

    async def stream(self, request: Request) -> AsyncIterator[TokenEvent]:
        """Submit and yield the request's events; the last has a finish reason. Leaving early cancels the request."""
        mailbox = Mailbox(asyncio.get_running_loop())
        with self._lock:
            if request.id in self._mailboxes:
                raise EngineError(f"a request with id {request.id} is running")
            self._mailboxes[request.id] = mailbox
        is_finished = False
        try:
            if self._ended.is_set() or not self._thread.put(self, Submit(request)):
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

    @property
    def has_work(self) -> bool:
        return self._engine is not None and self._engine.has_work

    @property
    def num_decoding(self) -> int:
        return self._engine.num_decoding if self._engine is not None else 0

    @property
    def has_ended(self) -> bool:
        return self._ended.is_set()

    def idle(self) -> bool:
        return self._engine is not None and self._engine.idle()

    def paused(self, seconds: float) -> None:
        """The thread has done something for others."""
        if self._engine is not None:
            self._engine.paused(seconds)

    def turn(self, num_decoding_elsewhere: int) -> None:
        """One step, if there is anything to do. The thread's other engines decode so many rows between two steps."""
        engine = self._engine
        if engine is None or not engine.has_work:
            return
        try:
            engine.share_thread(num_decoding_elsewhere)
            engine.step()
        except Exception as error:  # a fault of the loop itself: nobody may be left waiting
            self._fail(error)

    def handle(self, message: Message) -> None:
        """Do what a message asks; after the engine's end, answer that there is none."""
        if isinstance(message, Open):
            self._open()
        elif self._engine is None:
            self._refuse(message)
        elif isinstance(message, Call):
            self._call(self._engine, message)
        else:
            try:
                match message:
                    case Submit(request):
                        self._engine.submit(request)
                    case Cancel(request_id):
                        self._engine.cancel(request_id)
                    case Stop():
                        self._engine.cancel_all()
                        self._engine.close()
                        self._end()
            except Exception as error:  # a fault of the loop itself
                self._fail(error)

    def _open(self) -> None:
        build, self._build = self._build, None  # it may hold the model, which must go with the engine
        assert build is not None, "an engine is started once"
        try:
            self._engine = build(self._deliver)
        except BaseException as error:  # handed to whoever waits for the start
            self._status = EngineStatus(is_healthy=False, failure=str(error))
            self._ended.set()
            self._ready.set_exception(error)
            return
        self._status = self._engine.status()
        self._ready.set_result(None)

    def _call(self, engine: Steps, message: Call) -> None:
        if not message.future.set_running_or_notify_cancel():
            return
        started = engine.now()
        try:
            result = message.job()
        except BaseException as error:  # belongs to whoever asked
            engine.paused(engine.now() - started)
            message.future.set_exception(error)
        else:
            engine.paused(engine.now() - started)
            self._status = engine.status()  # who waited for the job sees what it changed
            message.future.set_result(result)

    def _refuse(self, message: Message) -> None:
        match message:
            case Call(_, future):
                if future.set_running_or_notify_cancel():
                    future.set_exception(Unavailable("the engine has stopped"))
            case Submit(request):
                detail = self._status.failure or "the engine has stopped"
                refusal = TokenEvent(request.id, finish_reason=FinishReason.ERROR, detail=detail)
                self._deliver([refusal], self._status)
            case _:
                pass

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

    def _fail(self, error: Exception) -> None:
        log.exception("the engine loop ended")
        self._status = EngineStatus(is_healthy=False, failure=f"{type(error).__name__}: {error}")
        self._end()

    def _end(self) -> None:
        """Let the engine go; every reader still waiting gets a final event."""
        self._engine = None
        self._ended.set()
        self._tell_all(self._status.failure or "the server is shutting down")

    def _tell_all(self, detail: str) -> None:
        with self._lock:
            left = list(self._mailboxes)
        last = [TokenEvent(request_id, finish_reason=FinishReason.ERROR, detail=detail) for request_id in left]
        self._deliver(last, EngineStatus(is_healthy=False, failure=detail))


def _await_destructors(thread: threading.Thread, timeout_s: float) -> None:
    """Wait until a joined thread is over for the system too, as `join` does itself from Python 3.13 on.

    MLX keeps what it compiled on a thread until then, Python objects among it: it waits for the interpreter's lock, and
    an interpreter that ends meanwhile aborts the process.
    """
    if sys.version_info >= (3, 13) or thread.is_alive():
        return
    task = Path(f"/proc/self/task/{thread.native_id}")
    if not task.parent.exists():
        time.sleep(NO_PROC_DESTRUCTORS_S)
        return
    until = time.monotonic() + timeout_s
    while task.exists() and time.monotonic() < until:
        time.sleep(0.001)


def _put_all(mail: list[tuple[Mailbox, TokenEvent]]) -> None:
    for mailbox, event in mail:
        mailbox.put(event)
