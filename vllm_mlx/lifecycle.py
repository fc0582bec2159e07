"""One server process from start to end: listen, load, serve, drain, stop. Part of the composition root.

    listening ─ load fails ──────────────────────────────► exit, one line
        │ loaded            signal            second signal or --shutdown-timeout
        └────────► serving ───────► draining ────────────► cancel what is left ─► exit
                                        └ nothing runs ──► exit

The server listens before the model is loaded, and answers 503 until it is, so that who watches it can tell loading from
dead. Signals are handled here and not by uvicorn, which would raise them again at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import uvicorn

from vllm_mlx.api.context import Phase, ServerContext
from vllm_mlx.errors import VllmMlxError
from vllm_mlx.options import LISTEN_FD, PARENT_FD
from vllm_mlx.settings import ServerSettings

log = logging.getLogger(__name__)

LAST_WORDS_S = 3.0
"""How long answers that were cancelled may take to be written."""
ENGINE_STOP_S = 5.0
POLL_S = 0.05


class Loaded(Protocol):
    """What `load` gives: `backend.Backend`, or a test's stand-in."""

    def install(self, context: ServerContext) -> None:
        """Put the parts into the context; called on the event loop."""
        ...

    def describe(self) -> str:
        """What was loaded, in a line."""
        ...

    def start_drain(self) -> None:
        """Take no new requests."""
        ...

    def close(self, timeout_s: float) -> bool:
        """Stop everything; False if a thread is stuck."""
        ...


class HttpServer(uvicorn.Server):
    """uvicorn without its signal handling."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Lifecycle:
    """Runs one server. `run` returns when all is over; `is_stuck` then says whether a thread still works."""

    def __init__(
        self,
        http: HttpServer,
        listener: socket.socket,
        context: ServerContext,
        load: Callable[[], Loaded],
        announce: Callable[[Loaded], None],
        *,
        shutdown_timeout_s: float,
    ) -> None:
        self._http = http
        self._listener = listener
        self._context = context
        self._load = load
        self._announce = announce
        self._shutdown_timeout_s = shutdown_timeout_s
        self._num_signals = 0
        self._signalled = asyncio.Event()
        self.is_stuck = False

    async def run(self) -> None:
        """Serve until a signal; raises what loading raised."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        serving = asyncio.create_task(self._http.serve(sockets=[self._listener]))
        signalled = asyncio.create_task(self._signalled.wait())
        loading = self._start_loading(loop)
        waited_for: set[asyncio.Future[Any]] = {serving, signalled, loading}
        try:
            await asyncio.wait(waited_for, return_when=asyncio.FIRST_COMPLETED)
            if not loading.done():
                self.is_stuck = True  # weights are being read, which cannot be interrupted
                return
            loaded = loading.result()
            loaded.install(self._context)
            self._context.phase = Phase.READY
            self._announce(loaded)
            await asyncio.wait(waited_for - {loading}, return_when=asyncio.FIRST_COMPLETED)
            await self._drain(loaded)
        finally:
            signalled.cancel()
            self._http.should_exit = True
            await serving
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        self._num_signals += 1
        self._signalled.set()

    def _start_loading(self, loop: asyncio.AbstractEventLoop) -> asyncio.Future[Loaded]:
        """Load on a daemon thread: a signal must be able to end the process meanwhile."""
        future: asyncio.Future[Loaded] = loop.create_future()

        def settle(loaded: Loaded | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            elif loaded is not None:
                future.set_result(loaded)

        def work() -> None:
            loaded, error = None, None
            try:
                loaded = self._load()
                # What loading made stays: the garbage collector need not walk through it again while serving.
                gc.collect()
                gc.freeze()
            except BaseException as caught:  # handed to `run`, which raises it
                error = caught
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, loaded, error)

        threading.Thread(target=work, name="load", daemon=True).start()
        return future

    async def _drain(self, loaded: Loaded) -> None:
        """Let what runs finish, up to the limit or a second signal; then end it."""
        self._context.phase = Phase.DRAINING
        loaded.start_drain()
        if num_live := len(self._context.live):
            log.info(
                "shutting down: %d running requests may finish within %g s; signal again to end them now",
                num_live,
                self._shutdown_timeout_s,
            )
        until = asyncio.get_running_loop().time() + self._shutdown_timeout_s
        while len(self._context.live) and self._num_signals < 2 and asyncio.get_running_loop().time() < until:
            await asyncio.sleep(POLL_S)
        if num_live := len(self._context.live):
            log.warning("cancelling %d requests that have not finished", num_live)
        self.is_stuck = not await asyncio.to_thread(loaded.close, ENGINE_STOP_S)


def is_behind_front() -> bool:
    return LISTEN_FD in os.environ


def end_with_parent() -> None:
    """Behind a front, end when it has: nobody else would. However it came, the pipe is closed then."""

    def wait(fd: int) -> None:
        os.read(fd, 1)
        os._exit(1)

    if (fd := os.environ.get(PARENT_FD)) is not None:
        threading.Thread(target=wait, args=(int(fd),), name="parent", daemon=True).start()


def bind(server: ServerSettings) -> socket.socket:
    """The listening socket; raises with the cause and the remedy."""
    if is_behind_front():
        return socket.socket(fileno=int(os.environ[LISTEN_FD]))
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((server.host, server.port))
    except OSError as error:
        listener.close()
        raise VllmMlxError(
            f"Cannot listen on {server.host}:{server.port} ({error.strerror or error}); is another server running "
            "there? Choose another --port or --host."
        ) from error
    listener.set_inheritable(True)
    return listener


def make_http_server(app: object, server: ServerSettings) -> HttpServer:
    behind_front = is_behind_front()
    config = uvicorn.Config(
        app,  # type: ignore[arg-type]
        # Only the front can reach the inherited socket, so its word on who calls is taken.
        forwarded_allow_ips="*" if behind_front else None,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="off",
        timeout_graceful_shutdown=int(LAST_WORDS_S),
        timeout_keep_alive=75,
        ssl_certfile=None if behind_front else server.ssl_certfile,
        ssl_keyfile=None if behind_front else server.ssl_keyfile,
        ssl_keyfile_password=None if behind_front else server.ssl_keyfile_password,
    )
    return HttpServer(config)
