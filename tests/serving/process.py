"""A real server process for tests: `python -m vllm_mlx.cli serve …` on a free port, watched from outside."""

from __future__ import annotations

import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

START_LIMIT_S = 120.0


def free_port() -> int:
    """A free port, below those that the system hands to clients, so that none takes it before the server does."""
    while True:
        port = random.randrange(15000, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def other_address() -> str:
    """An address of this machine beside 127.0.0.1; on Linux all that begin with 127 are."""
    if sys.platform == "linux":
        return "127.0.0.2"
    return socket.gethostbyname(socket.gethostname())


class ServerProcess:
    """One server, of no named model if `model` is "". `output` is what it has printed so far, both streams together.

    `environment` is set beside what the tests have; of theirs no setting of ours is passed on. `entry` is what Python
    runs. `host` is where it listens, if not on loopback; `prefix` stands before the command.
    """

    def __init__(
        self,
        model: Path | str,
        *flags: str,
        log: Path,
        port: int | None = None,
        verify: ssl.SSLContext | bool = True,
        environment: Mapping[str, str] | None = None,
        entry: Sequence[str] = ("-m", "vllm_mlx.cli"),
        host: str | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.port = port or free_port()
        self.url = f"{'https' if '--ssl-certfile' in flags else 'http'}://{host or '127.0.0.1'}:{self.port}"
        flags = (*(("--host", host) if host else ()), *flags)
        self._verify = verify
        self._log = log
        named = [str(model)] if model else []
        command = [*prefix, sys.executable, *entry, "serve", *named, "--port", str(self.port), *flags]
        passed_on = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_MLX_")}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**passed_on, **(environment or {})}
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    def wait_until_healthy(self) -> None:
        limit = time.monotonic() + START_LIMIT_S
        while time.monotonic() < limit:
            assert self.process.poll() is None, f"the server ended:\n{self.output}"
            try:
                if httpx.get(f"{self.url}/health", timeout=5, verify=self._verify).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready in time:\n{self.output}")

    def signal(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(timeout=60)


@contextmanager
def serving(
    model: Path | str, *flags: str, log: Path, is_awaited: bool = True, **options: Any
) -> Iterator[ServerProcess]:
    """A server that is ready, and ended at the end; `options` are those of `ServerProcess`."""
    server = ServerProcess(model, *flags, log=log, **options)
    try:
        if is_awaited:
            server.wait_until_healthy()
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
