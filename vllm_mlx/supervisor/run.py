"""`serve --engine-process`: a front that imports no MLX, and the server behind it in a process of its own.

    client ── TCP ──► front (this process) ── Unix socket ──► child: the whole server
                        │ child crashes
                        └ start another; ask again what had shown nothing; end the rest with an error event

MLX can abort a process (an allocation that fails, a fault on the GPU), and no exception handler helps then. The border
is HTTP itself rather than the engine's types: whatever the server can do works behind it unchanged, and nothing of it
is written twice.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
import time
from collections.abc import Sequence

from vllm_mlx.errors import VllmMlxError
from vllm_mlx.lifecycle import bind, make_http_server
from vllm_mlx.observability import logs
from vllm_mlx.settings import Settings
from vllm_mlx.supervisor.child import Child, Rendezvous
from vllm_mlx.supervisor.crashes import CrashLog, cause_of
from vllm_mlx.supervisor.proxy import Proxy

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps one child running. `run` returns the exit code when all is over."""

    def __init__(self, arguments: Sequence[str], place: Rendezvous, crashes: CrashLog | None = None) -> None:
        self._arguments = arguments
        self._place = place
        self._crashes = crashes or CrashLog()
        self._child: Child | None = None
        self._is_ready = asyncio.Event()
        self._is_over = False
        self._is_stopping = False

    # ── for the proxy ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def current(self) -> Child | None:
        return self._child if self._is_ready.is_set() and not self._is_over else None

    async def ready(self) -> Child | None:
        await self._is_ready.wait()
        return None if self._is_over else self._child

    def report(self) -> dict[str, object]:
        return {
            "pid": self._child.pid if self._child is not None else None,
            "num_crashes": self._crashes.num_crashes,
            "last_crash": self._crashes.last_cause,
        }

    # ── the life of the children ────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> int:
        was_ready = False
        try:
            while True:
                self._child = child = await Child.start(self._arguments, self._place)
                if await child.wait_until_ready():
                    was_ready = True
                    self._is_ready.set()
                    if self._crashes.num_crashes:
                        log.info("the engine's process runs again (%d)", child.pid)
                code = await child.ended
                self._is_ready.clear()
                await child.close()
                if self._is_stopping or not was_ready:
                    return code if code >= 0 else 1  # asked for, or it has said itself why it cannot serve
                cause = cause_of(code)
                if not self._crashes.record(time.monotonic(), cause):
                    print(f"vllm-mlx: the engine's process crashed too often; last, {cause}.", file=sys.stderr)
                    return 1
                log.error("the engine's process crashed (%s); starting another", cause)
        finally:
            self._is_over = True
            self._is_ready.set()

    def stop(self) -> None:
        """Pass a signal to end on to the child, which drains; a second one ends it at once."""
        self._is_stopping = True
        if self._child is not None:
            self._child.signal(signal.SIGTERM)


def supervise(settings: Settings, arguments: Sequence[str]) -> int:
    """Serve `vllm-mlx ARGUMENTS` from a process of its own until a signal. Returns the exit code."""
    settings, _ = settings.resolve()
    logs.configure(settings.server.log_level, settings.server.log_format)
    listener = bind(settings.server)
    try:
        place = Rendezvous()
    except OSError as error:
        raise VllmMlxError(f"The socket between front and engine cannot be made ({error}); free /tmp.") from error
    port = listener.getsockname()[1]

    async def serve() -> int:
        supervisor = Supervisor([*arguments, "--port", str(port)], place)
        proxy = Proxy(
            supervisor,
            max_body_bytes=int(settings.server.max_body_mb * 2**20),
            calls_tools=settings.mcp.mcp_config is not None and settings.mcp.mcp_in_chat,
        )
        http = make_http_server(proxy, settings.server)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, supervisor.stop)
        serving = asyncio.create_task(http.serve(sockets=[listener]))
        try:
            return await supervisor.run()
        finally:
            http.should_exit = True
            await serving

    try:
        return asyncio.run(serve())
    finally:
        place.close()
