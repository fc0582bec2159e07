"""The pages: static files of the `vllm_mlx.ui` package at `/`, `/dashboard` and `/ui/…`.

Their policy allows nothing but these files. They reveal nothing of this server: what they show they ask for, with a
key where one is needed.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from importlib.resources.abc import Traversable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.errors import HttpError

router = APIRouter(include_in_schema=False)

# A page shows what a model wrote: nothing in it may load code, styles or images from elsewhere, or be framed.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".webmanifest": "application/manifest+json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
    ".woff2": "font/woff2",
    ".txt": "text/plain; charset=utf-8",
}


@router.api_route("/", methods=["GET", "HEAD"])
async def index(request: Request) -> Response:
    """The chat page. Some clients only ask (HEAD) whether anything is there."""
    if request.method == "HEAD":
        return Response(status_code=200, headers=HEADERS)
    return _serve(request, "index.html")


@router.api_route("/dashboard", methods=["GET", "HEAD"])
async def dashboard(request: Request) -> Response:
    """The dashboard; what it shows comes from `/v1/dashboard`."""
    return _serve(request, "dashboard.html")


@router.api_route("/ui/{path:path}", methods=["GET", "HEAD"])
async def asset(path: str, request: Request) -> Response:
    return _serve(request, path)


def has_page() -> bool:
    """Whether this installation has the chat page."""
    return _find("index.html") is not None


def _serve(request: Request, path: str) -> Response:
    file = _find(path)
    if file is None:
        raise HttpError(404, "There is no such page.", code="not_found")
    content = file.read_bytes()
    etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers={**HEADERS, "etag": etag})
    return Response(content, headers={**HEADERS, "etag": etag}, media_type=_type_of(path))


def _type_of(path: str) -> str:
    return TYPES["." + path.rsplit(".", 1)[-1]]


def _find(path: str) -> Traversable | None:
    """A file of the package, of a known type; nothing outside of it can be named."""
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\\" in part or part.startswith("_") for part in parts):
        return None
    if "." + path.rsplit(".", 1)[-1] not in TYPES:
        return None
    node = files("vllm_mlx.ui").joinpath(*parts)
    return node if node.is_file() else None
