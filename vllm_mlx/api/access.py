"""The outermost middleware: a request id in and out, one access line, one count, and the last boundary for errors.

Pure ASGI: Starlette's BaseHTTPMiddleware would cost ten times as much a chunk and hide disconnects.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_mlx.api.errors import error_response, is_anthropic
from vllm_mlx.observability.journal import Journal
from vllm_mlx.observability.metrics import Metrics

log = logging.getLogger(__name__)

# What may be echoed into a header and a log line.
_SAFE_ID = re.compile(r"[A-Za-z0-9._:@/+=-]{1,128}")
# Asked again and again by probes and by our own pages.
_QUIET_PATHS = frozenset(
    {"/health", "/health/ready", "/health/live", "/metrics", "/", "/dashboard", "/v1/dashboard", "/v1/requests"}
)


class RequestScope:
    """Gives each HTTP request its id, and sees to it that each gets an answer in its protocol's shape."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, journal: Journal) -> None:
        self._app = app
        self._metrics = metrics
        self._journal = journal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _given_id(scope) or f"req_{uuid.uuid4().hex[:24]}"
        scope.setdefault("state", {})["request_id"] = request_id
        started, status = time.monotonic(), 0
        id_headers = [(b"x-request-id", request_id.encode())]
        if is_anthropic(scope):
            id_headers.append((b"request-id", request_id.encode()))

        async def tagged_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *id_headers]}
            await send(message)

        try:
            await self._app(scope, receive, tagged_send)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # The request boundary: log and answer.
            log.exception("request %s failed: %s %s", request_id, scope["method"], scope["path"])
            if status:
                raise
            await error_response(scope, error)(scope, receive, tagged_send)
        finally:
            self._note(scope, request_id, status, time.monotonic() - started)

    def _note(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self._metrics.http_answers.labels(method=scope["method"], route=route, status=str(status)).inc()
        state = scope.get("state", {})
        path, error = _printable(scope["path"]), state.get("error", "")
        is_not_yet = status == 503 and path.startswith("/health")  # what a probe asks for while the model loads
        if status >= 400 and not is_not_yet:
            self._journal.add_problem(f"HTTP {status}: {scope['method']} {path}", error, request_id)
        # A generation has a line of its own at its end (observability/journal.py), which says more.
        is_quiet = scope["path"] in _QUIET_PATHS or scope["path"].startswith("/ui/") or (
            state.get("is_generation") and status < 400
        )
        level = logging.DEBUG if is_quiet else logging.INFO
        if log.isEnabledFor(level):
            client = (scope.get("client") or ("-",))[0]
            fields = {"client": client, "method": scope["method"], "path": path, "status": status,
                      "seconds": round(seconds, 4), "request_id": request_id}  # fmt: skip
            if error:
                fields["error"] = error
            log.log(
                level,
                "%s %s %s → %d in %.3fs (%s)%s",
                client, scope["method"], path, status, seconds, request_id, f": {error}" if error else "",
                extra=fields,
            )  # fmt: skip


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _SAFE_ID.fullmatch(text) else None
    return None


def _printable(path: str) -> str:
    """A path fit for a log line: no control characters, no novels."""
    return "".join(c if c.isprintable() else "?" for c in path[:200])
