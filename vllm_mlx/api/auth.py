"""Who may call: a key as `Authorization: Bearer KEY` or `x-api-key: KEY`, compared in constant time. Pure ASGI.

Open without a key: `/health` and its two probes, CORS preflights, and static pages that reveal nothing of this server
(the chat page and dashboard, the API's documentation). Everything else follows the policy.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send

from vllm_mlx.api.errors import HttpError, error_response
from vllm_mlx.api.requests import Caller

OPEN_PATHS = frozenset(
    {"/", "/dashboard", "/health", "/health/ready", "/health/live", "/docs", "/openapi.json", "/favicon.ico"}
)
OPEN_PREFIXES = ("/ui/",)


class Authentication:
    """Names the caller in `scope["state"]["caller"]`, or answers 401."""

    def __init__(self, app: ASGIApp, *, api_keys: Mapping[str, str], shared_cache: bool, is_loopback: bool) -> None:
        self._app = app
        # Digests have one length, so that comparing tells nothing of a key's.
        self._digests = {name: _digest(key) for name, key in api_keys.items()}
        self._shared_cache = shared_cache
        self._is_loopback = is_loopback

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            caller = self._caller(scope)
        except HttpError as error:
            await error_response(scope, error)(scope, receive, send)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)

    def _caller(self, scope: Scope) -> Caller:
        address = (scope.get("client") or ("unknown", 0))[0]
        if not self._digests:
            return Caller(name=f"address:{address}", is_local=self._is_loopback and _is_loopback(address))
        key = _given_key(scope)
        name = self._name_of(key) if key is not None else None
        if name is not None:
            return Caller(
                name=f"key:{name}", namespace="" if self._shared_cache else f"key:{name}/", is_authenticated=True
            )
        if _is_open(scope):
            return Caller(name=f"address:{address}")
        if key is None:
            raise HttpError(
                401,
                "An API key is needed; send it as 'Authorization: Bearer KEY' or as 'x-api-key: KEY'.",
                code="missing_api_key",
            )
        raise HttpError(401, "This API key is not valid here.", code="invalid_api_key")

    def _name_of(self, key: str) -> str | None:
        """Compares with every key, so that the time taken does not tell which."""
        digest, found = _digest(key), None
        for name, expected in self._digests.items():
            if hmac.compare_digest(digest, expected):
                found = name
        return found


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _given_key(scope: Scope) -> str | None:
    """The bearer token if there is one, else `x-api-key`."""
    given = None
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, token = value.decode("latin-1").partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
        elif name == b"x-api-key":
            given = value.decode("latin-1").strip() or None
    return given


def _is_open(scope: Scope) -> bool:
    path: str = scope["path"]
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES) or scope["method"] == "OPTIONS"


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False
