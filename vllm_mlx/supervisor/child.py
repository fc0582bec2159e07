"""The process that computes: the whole server on a socket that only the front knows. Event loop of the front.

The listening socket is the front's and outlives every child, so a connection made while one is starting waits in its
backlog. A child watches a pipe and ends when the front is gone, however that came.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import httpx

from vllm_mlx.options import LISTEN_FD, PARENT_FD

POLL_S = 0.05


class Rendezvous:
    """The Unix socket between front and child."""

    def __init__(self) -> None:
        # Not the system's temporary folder: macOS's is too long for a socket's name.
        self._folder = tempfile.TemporaryDirectory(prefix="vllm-mlx-", dir="/tmp")
        self.path = str(Path(self._folder.name) / "engine")
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(self.path)
        self.socket.listen(2048)

    def close(self) -> None:
        self.socket.close()
        self._folder.cleanup()


class Child:
    """One start of the process. `client` speaks to it."""

    def __init__(self, process: asyncio.subprocess.Process, life_line: int, client: httpx.AsyncClient) -> None:
        self._process = process
        self._life_line = life_line
        self.client = client
        self.ended = asyncio.create_task(process.wait())

    @classmethod
    async def start(cls, arguments: Sequence[str], place: Rendezvous) -> Child:
        """Start `vllm-mlx ARGUMENTS` on the socket."""
        theirs, ours = os.pipe()
        fd = place.socket.fileno()
        environment = {**os.environ, LISTEN_FD: str(fd), PARENT_FD: str(theirs)}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "vllm_mlx.cli",
                *arguments,
                env=environment,
                pass_fds=(fd, theirs),
                # Ctrl-C reaches the front alone, which passes it on once.
                start_new_session=True,
            )
        finally:
            os.close(theirs)
        transport = httpx.AsyncHTTPTransport(uds=place.path, limits=httpx.Limits(max_connections=None))
        client = httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=None)
        return cls(process, ours, client)

    @property
    def has_ended(self) -> bool:
        return self.ended.done()

    async def gone(self) -> None:
        """Wait for the process to have ended: a connection may break a moment before. Not long, for a live one."""
        await asyncio.wait({self.ended}, timeout=1.0)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def wait_until_ready(self) -> bool:
        """True when it answers that it is healthy, False when it has ended before."""
        while not self.ended.done():
            try:
                answer = await self.client.get("/health", timeout=5.0)
                if answer.status_code == 200:
                    return True
            except httpx.HTTPError:
                pass  # it does not accept yet
            await asyncio.wait({self.ended}, timeout=POLL_S)
        return False

    def signal(self, number: int = signal.SIGTERM) -> None:
        if not self.ended.done():
            self._process.send_signal(number)

    async def close(self) -> None:
        os.close(self._life_line)
        await self.client.aclose()
