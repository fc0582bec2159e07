"""A streaming HTTP client that costs next to nothing while it measures, because it shares the machine with the server.

It keeps each piece that the socket gives with its time, and reads HTTP, SSE and JSON only when the answer is complete.
One connection a request. asyncio thread; knows OpenAI's chat stream, as every server here speaks it.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from vllm_mlx.bench.measure import Trace


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI-compatible server is: `url` ends before `/chat/completions`."""

    url: str
    model: str = "default"
    api_key: str | None = None
    timeout_s: float = 600.0


class Receiver(asyncio.Protocol):
    """Sends one request; `pieces` are what came back, with the times."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self.pieces: list[tuple[float, bytes]] = []
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.pieces.append((time.perf_counter(), data))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.closed.done():
            if exc is None:
                self.closed.set_result(None)
            else:
                self.closed.set_exception(exc)


async def stream_chat(endpoint: Endpoint, body: Mapping[str, Any]) -> Trace:
    """Send a chat request with `stream` and read the whole answer. Failures are in the trace, not raised."""
    started = time.perf_counter()
    try:
        async with asyncio.timeout(endpoint.timeout_s):
            pieces = await _exchange(endpoint, json.dumps(body).encode())
    except (OSError, TimeoutError) as error:
        return Trace(started, time.perf_counter(), error=f"{type(error).__name__}: {error}")
    return read_answer(started, pieces)


async def _exchange(endpoint: Endpoint, body: bytes) -> list[tuple[float, bytes]]:
    transport, receiver = await send(endpoint, "/chat/completions", body)
    try:
        await receiver.closed
    finally:
        transport.close()
    return receiver.pieces


async def send(endpoint: Endpoint, path: str, body: bytes) -> tuple[asyncio.Transport, Receiver]:
    """Open a connection and post `body` to `path` under the endpoint's URL; the caller closes or aborts it."""
    target = urlsplit(endpoint.url.rstrip("/") + path)
    if not target.hostname:
        raise OSError(f"{endpoint.url} names no host")
    headers = [
        f"POST {target.path} HTTP/1.1",
        f"Host: {target.netloc}",
        "Content-Type: application/json",
        "Accept: text/event-stream",
        "Connection: close",
        f"Content-Length: {len(body)}",
    ]
    if endpoint.api_key:
        headers.append(f"Authorization: Bearer {endpoint.api_key}")
    request = "\r\n".join(headers).encode() + b"\r\n\r\n" + body
    tls = ssl.create_default_context() if target.scheme == "https" else None
    port = target.port or (443 if tls else 80)
    return await asyncio.get_running_loop().create_connection(lambda: Receiver(request), target.hostname, port, ssl=tls)


def read_answer(started: float, pieces: list[tuple[float, bytes]]) -> Trace:
    """What a complete answer says, with the time each event was complete."""
    ended = pieces[-1][0] if pieces else started
    data = b"".join(piece for _, piece in pieces)
    head, separator, _ = data.partition(b"\r\n\r\n")
    status = head.split(b" ", 2)[1:2]
    if not separator or status != [b"200"]:
        return Trace(started, ended, error=f"HTTP {b''.join(status).decode() or 'no answer'}: {data[-300:]!r}")
    arrivals = _Arrivals(pieces)
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    start = len(head) + len(separator)
    runs = _dechunk(data, start) if is_chunked else iter([(start, data[start:])])
    trace = Trace(started, ended)
    for offset, event in _events(runs):
        _take(trace, arrivals.time_of(offset), event)
    if trace.error is None and not trace.is_complete:
        trace.error = "the answer was cut off"
    if trace.error is None and not trace.stamps:
        trace.error = "the answer has no content"
    if trace.num_completion_tokens is None:
        trace.num_completion_tokens = len(trace.stamps)
        trace.is_counted_by_events = True
    return trace


def _take(trace: Trace, arrived: float, event: bytes) -> None:
    """Add one `data:` event to the trace."""
    if event == b"[DONE]":
        trace.is_complete = True
        return
    message = json.loads(event)
    if error := message.get("error"):
        trace.error = str(error.get("message", error) if isinstance(error, dict) else error)
    usage = message.get("usage")
    if usage:
        trace.num_prompt_tokens = usage.get("prompt_tokens")
        trace.num_completion_tokens = usage.get("completion_tokens")
        trace.num_cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    for choice in message.get("choices") or ():
        delta = choice.get("delta") or {}
        trace.tokens += [entry["token"] for entry in (choice.get("logprobs") or {}).get("content") or ()]
        text = delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning") or ""
        if text or delta.get("tool_calls"):
            trace.stamps.append(arrived)
            trace.text += text


class _Arrivals:
    """Turns a position in the answer's bytes into the time its piece arrived; asked in ascending order."""

    def __init__(self, pieces: list[tuple[float, bytes]]) -> None:
        self._pieces = pieces
        self._index = 0
        self._end = len(pieces[0][1]) if pieces else 0

    def time_of(self, offset: int) -> float:
        while offset >= self._end and self._index + 1 < len(self._pieces):
            self._index += 1
            self._end += len(self._pieces[self._index][1])
        return self._pieces[self._index][0]


def _dechunk(data: bytes, position: int) -> Iterator[tuple[int, bytes]]:
    """(offset, bytes) of each chunk of a chunked body."""
    while True:
        line_end = data.find(b"\r\n", position)
        if line_end < 0:
            return
        size = int(data[position:line_end].split(b";")[0] or b"0", 16)
        if size == 0:
            return
        yield line_end + 2, data[line_end + 2 : line_end + 2 + size]
        position = line_end + 2 + size + 2


def _events(runs: Iterator[tuple[int, bytes]]) -> Iterator[tuple[int, bytes]]:
    """(offset of its last byte, payload) of each `data:` line."""
    rest = b""
    for start, run in runs:
        position = 0
        while (end := run.find(b"\n", position)) >= 0:
            line = rest + run[position:end]
            rest = b""
            if line.startswith(b"data:"):
                yield start + end, line[5:].strip()
            position = end + 1
        rest += run[position:]
