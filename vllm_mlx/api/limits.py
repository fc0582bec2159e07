"""How much one caller may send: requests a minute, and bytes a request. Pure ASGI."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vllm_mlx.api.errors import HttpError, error_response
from vllm_mlx.api.requests import Caller

WINDOW_S = 60.0


class RateLimit:
    """At most so many POSTs a minute and caller, over a sliding window; more are answered 429 at once.

    A caller is its key's name where keys are used, else its address: an invented key header buys nothing.
    """

    MAX_CALLERS = 10_000

    def __init__(self, app: ASGIApp, *, requests_per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._limit = requests_per_minute
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "POST"
            and (wait_s := self._admit(_caller(scope))) is not None
        ):
            error = HttpError(
                429,
                f"More than {self._limit} requests in a minute; try again in {max(1, round(wait_s))} s.",
                code="rate_limit_exceeded",
                retry_after_s=wait_s,
            )
            await error_response(scope, error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _admit(self, caller: str) -> float | None:
        """Count a request; or the seconds until one will be admitted."""
        now = self._clock()
        times = self._times.setdefault(caller, deque())
        self._times.move_to_end(caller)
        while times and times[0] <= now - WINDOW_S:
            times.popleft()
        if len(times) >= self._limit:
            return times[0] + WINDOW_S - now
        times.append(now)
        # Callers not heard of for longest are forgotten: memory stays bounded whatever addresses come along.
        while len(self._times) > self.MAX_CALLERS:
            self._times.popitem(last=False)
        return None


def _caller(scope: Scope) -> str:
    caller = (scope.get("state") or {}).get("caller")
    return caller.name if isinstance(caller, Caller) else ""


class BodyTooLarge(HTTPException):
    """Raised while a body is read; an HTTPException, so that whoever reads the body lets it pass."""


class BodyLimit:
    """Refuses bodies above a size: at once by their stated length, else when they pass it."""

    def __init__(self, app: ASGIApp, *, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _content_length(scope) > self._max_body_bytes:
            response = error_response(scope, self._error())
            # What remains of the body is not read, so the connection cannot be used again.
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise BodyTooLarge(413, str(self._error()), {"connection": "close"})
            return message

        await self._app(scope, limited_receive, send)

    def _error(self) -> HttpError:
        limit_mib = self._max_body_bytes / 2**20
        return HttpError(
            413, f"The request body is larger than {limit_mib:.3g} MiB, the limit here.", code="request_too_large"
        )


def _content_length(scope: Scope) -> int:
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit():
            return int(value)
    return 0
