"""The front's HTTP side: passes requests to the child, and asks again what a crash took before anything was shown.

A pure ASGI application. Bodies are passed as they come; a request's body is kept until its answer has begun. Only what
may be done twice is asked again: reading, and computing an answer. What changes something is not, since a process that
has ended cannot say how far it came.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol

import httpx
import orjson
from starlette.types import Message, Receive, Scope, Send

from vllm_mlx.api.sse import ClientGone, watch_client
from vllm_mlx.supervisor.child import Child
from vllm_mlx.supervisor.opening import Opening, error_body, error_event

log = logging.getLogger(__name__)

MAX_TRIES = 3
"""A request that was running in so many crashes may be their cause: it is not tried again."""
READING = ("GET", "HEAD", "OPTIONS")
GENERATING = frozenset(
    ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")  # where tools may be called in between
)
COMPUTING = frozenset(
    ("/v1/responses/input_tokens", "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/v1/embeddings")
    + ("/v1/rerank", "/v2/rerank", "/rerank", "/v1/score", "/score")
    + ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/audio/speech")
)
PROBES = ("/health", "/health/ready", "/health/live")
HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-authenticate proxy-authorization te trailer transfer-encoding upgrade".split()
)


class Children(Protocol):
    """`run.Supervisor`, as the proxy sees it."""

    async def ready(self) -> Child | None:
        """The child that serves now, after waiting for one that starts; None when there will be none."""
        ...

    def report(self) -> dict[str, object]:
        """For `/health`."""
        ...

    @property
    def current(self) -> Child | None:
        """The child, if it is ready now."""
        ...


class EngineLost(Exception):
    """The child went away before the answer was complete. `was_untouched`: it had not begun to work on it."""

    def __init__(self, *, was_untouched: bool = False) -> None:
        super().__init__()
        self.was_untouched = was_untouched


class Proxy:
    """`calls_tools`: answers may call tools of MCP servers on the way, so that generating, too, changes something."""

    def __init__(self, children: Children, *, max_body_bytes: int, calls_tools: bool = False) -> None:
        self._children = children
        self._max_body_bytes = max_body_bytes
        self._repeatable = COMPUTING if calls_tools else COMPUTING | GENERATING

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        if scope["path"] in PROBES and scope["method"] in ("GET", "HEAD"):
            await self._health(scope["path"], send)
            return
        body = await _read_body(receive, self._max_body_bytes)
        if body is None:
            message = f"The request body is larger than {self._max_body_bytes} bytes."
            await _send_json(send, 413, error_body(scope["path"], message, "body_too_large"))
            return
        with suppress(ClientGone):
            async with watch_client(receive):
                await self._answer(scope, body, send)

    async def _answer(self, scope: Scope, body: bytes, send: Send) -> None:
        path = scope["path"]
        answer = Answer(path, send)
        for _ in range(MAX_TRIES):
            child = await self._children.ready()
            if child is None:
                break
            try:
                await answer.relay(child, scope, body)
                return
            except EngineLost as lost:
                await child.gone()
                if answer.has_shown:
                    await answer.fail("The engine's process ended while it generated this answer; ask again.")
                    return
                if not (lost.was_untouched or scope["method"] in READING or path in self._repeatable):
                    await answer.fail(
                        "The engine's process ended during this request, which may have been carried out or not; "
                        "it is not repeated by itself. Look before you ask again.",
                        status=502,
                    )
                    return
                log.warning("%s is asked again: the engine's process ended before its answer began", path)
        await answer.fail("The engine's process has ended and this request was lost; ask again later.")

    async def _health(self, path: str, send: Send) -> None:
        """The child's own answer when there is one, and always what became of its process. Who can start another child
        is alive without one."""
        report = self._children.report()
        child = self._children.current
        if child is not None:
            with suppress(httpx.HTTPError):
                answer = await child.client.get(path, timeout=5.0)
                await _send_json(send, answer.status_code, {**answer.json(), "engine_process": report})
                return
        body = {"status": "restarting", "reason": report["last_crash"] or "the engine's process is starting"}
        await _send_json(send, 200 if path == "/health/live" else 503, {**body, "engine_process": report})


class Answer:
    """One answer on its way to the client. `has_shown`: the client has seen some of it, so it cannot begin anew."""

    def __init__(self, path: str, send: Send) -> None:
        self._path = path
        self._send = send
        self._has_started = False
        self._is_stream = False
        self.has_shown = False

    async def relay(self, child: Child, scope: Scope, body: bytes) -> None:
        """Ask the child and pass on what it says. Raises EngineLost when it ends in between."""
        request = child.client.build_request(
            scope["method"], _target(scope), headers=_request_headers(scope), content=body or None
        )
        try:
            response = await child.client.send(request, stream=True)
        except httpx.TransportError as error:
            raise EngineLost(was_untouched=isinstance(error, httpx.ConnectError)) from error
        try:
            if response.status_code == 503 and child.has_ended:
                # From the next child, which took the connection from the backlog while it was loading.
                raise EngineLost(was_untouched=True)
            await self._pass_on(response)
        except httpx.TransportError as error:
            raise EngineLost from error
        finally:
            await response.aclose()

    async def _pass_on(self, response: httpx.Response) -> None:
        self._is_stream = response.headers.get("content-type", "").startswith("text/event-stream")
        if self._is_stream:
            opening = Opening()
            await self._start(response)
            async for data in response.aiter_raw():
                if shown := opening.feed(data):
                    self.has_shown = opening.is_over
                    await self._send({"type": "http.response.body", "body": shown, "more_body": True})
            await self._send({"type": "http.response.body", "body": opening.finish(), "more_body": False})
            return
        # A whole answer is shown whole: one that is cut off is asked for again.
        content = b"".join([data async for data in response.aiter_raw()])
        await self._start(response)
        self.has_shown = True
        await self._send({"type": "http.response.body", "body": content, "more_body": False})

    async def _start(self, response: httpx.Response) -> None:
        if self._has_started:
            return
        self._has_started = True
        headers = [(name.lower(), value) for name, value in response.headers.raw if name.lower() not in HOP_BY_HOP]
        start: Message = {"type": "http.response.start", "status": response.status_code, "headers": headers}
        await self._send(start)

    async def fail(self, message: str, status: int = 503) -> None:
        """End with an error: an event in a stream that has begun, else a status."""
        if self._has_started:
            body = error_event(self._path, message) if self._is_stream else b""
            await self._send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await _send_json(self._send, status, error_body(self._path, message, "engine_crashed"))


def _target(scope: Scope) -> str:
    raw: bytes = scope.get("raw_path") or scope["path"].encode()
    query: bytes = scope["query_string"]
    return (raw + (b"?" + query if query else b"")).decode("latin-1")


def _request_headers(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The client's headers, and its address, which the child cannot see."""
    dropped = HOP_BY_HOP | {b"x-forwarded-for", b"x-forwarded-proto", b"content-length", b"expect"}
    headers = [(name, value) for name, value in scope["headers"] if name not in dropped]
    address = scope["client"][0] if scope.get("client") else "127.0.0.1"
    return [*headers, (b"x-forwarded-for", address.encode()), (b"x-forwarded-proto", scope["scheme"].encode())]


async def _read_body(receive: Receive, max_bytes: int) -> bytes | None:
    """The request's body; None when it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        part = message.get("body", b"")
        size += len(part)
        if size > max_bytes:
            return None
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


async def _send_json(send: Send, status: int, body: dict[str, object]) -> None:
    headers = [(b"content-type", b"application/json")]
    if status == 503:
        headers.append((b"retry-after", b"5"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": orjson.dumps(body)})
