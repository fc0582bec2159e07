"""Starts servers to be measured, waits until they answer, and ends exactly those. asyncio thread."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from vllm_mlx.bench.client import Endpoint, stream_chat
from vllm_mlx.errors import VllmMlxError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 10.0


def ours(model: str, port: int, extra: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-m", "vllm_mlx", "serve", model, "--port", str(port), "--log-level", "warning", *extra]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.asynccontextmanager
async def running(
    command: Sequence[str], port: int, model: str, *, log: Path | None = None
) -> AsyncIterator[tuple[Endpoint, int]]:
    """The server of `command` and its process id, ready to answer, for the length of the block.

    Its output goes to `log`, which stays, or to a file that goes when the block ends well.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    is_kept, log = log is not None, log or Path(tempfile.mkstemp(prefix="vllm-mlx-bench-", suffix=".log")[1])
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(*command, stdout=output, stderr=output, env=environment)
    try:
        endpoint = Endpoint(f"http://127.0.0.1:{port}/v1", model)
        await _wait_until_ready(process, endpoint, log)
        yield endpoint, process.pid
    finally:
        await _stop(process)
    if not is_kept:
        log.unlink(missing_ok=True)


async def _wait_until_ready(process: asyncio.subprocess.Process, endpoint: Endpoint, log: Path) -> None:
    """Until a first short answer came, so that loading and the first compilation are over."""
    until = time.monotonic() + START_TIMEOUT_S
    body = {
        "model": endpoint.model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "stream": True,
    }  # fmt: skip
    trace = await stream_chat(endpoint, body)
    while trace.error is not None:
        if process.returncode is not None:
            last = log.read_text(errors="replace").strip().splitlines()[-1:] or ["no message"]
            raise VllmMlxError(f"A server ended while starting (code {process.returncode}): {last[0]} (log: {log})")
        if time.monotonic() > until:
            raise VllmMlxError(f"A server did not answer within {START_TIMEOUT_S:.0f} s: {trace.error} (log: {log})")
        await asyncio.sleep(0.3)
        trace = await stream_chat(endpoint, body)


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    except TimeoutError:
        process.kill()
        await process.wait()
