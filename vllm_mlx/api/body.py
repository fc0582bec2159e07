"""Reading a JSON request body: bytes → UTF-8 → JSON → wire type, each failure a 400 that says what and where.

Handlers call `read_body` themselves, since FastAPI's own body handling is picky about content types and vague about
errors; `json_body` keeps the OpenAPI page true.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request

from vllm_mlx.api.errors import invalid_from
from vllm_mlx.errors import Cancelled, InvalidRequest

MAX_DEPTH = 128
"""Deepest nesting accepted: above any real schema, far below what recursive code downstream can take."""

_SHOWN_PATH, _SHOWN_CHARACTERS = 4, 200

Wire = TypeVar("Wire", bound=BaseModel)


async def read_body(request: Request, wire: type[Wire]) -> Wire:
    """The request's body as `wire`; raises `InvalidRequest` naming the field."""
    try:
        raw = await request.body()
    except ClientDisconnect as error:
        raise Cancelled("The client left before its request was complete.") from error
    return parse_body(raw, wire)


def parse_body(raw: bytes, wire: type[Wire]) -> Wire:
    """Bytes as `wire`."""
    value = parse_json(raw)
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.", code="invalid_type")
    try:
        return wire.model_validate(value)
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_context=False, include_input=False)) from error


def parse_json(raw: bytes) -> Any:
    if not raw:
        raise InvalidRequest("The request body is empty; send a JSON object.", code="invalid_json")
    try:
        value = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        try:
            raw.decode()
        except UnicodeDecodeError as unicode_error:
            at = unicode_error.start
            raise InvalidRequest(
                f"The request body is not valid UTF-8 (byte {at}).", code="invalid_encoding"
            ) from unicode_error
        raise InvalidRequest(f"The request body is not valid JSON: {error}.", code="invalid_json") from error
    # Few brackets cannot nest deeply; the walk is only for the others.
    if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _depth_exceeds(value, MAX_DEPTH):
        raise InvalidRequest(
            f"The request body nests deeper than {MAX_DEPTH} levels; flatten it.",
            param=_path_to_depth(value),
            code="invalid_json",
        )
    return value


def _path_to_depth(body: Any) -> str | None:
    """The first field that nests too deeply: the beginning of its path."""
    path: list[str] = []
    node, limit = body, MAX_DEPTH
    while isinstance(node, (dict, list)) and len(path) < _SHOWN_PATH:
        limit -= 1
        children = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in children:
            if isinstance(child, (dict, list)) and _depth_exceeds(child, limit):
                path.append(str(key))
                node = child
                break
        else:
            break
    return ".".join(path)[:_SHOWN_CHARACTERS] or None


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for node in level
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]
        if not level:
            return False
    return True


def json_body(wire: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` of a route whose handler reads `wire` by `read_body`."""
    schema = {"$ref": f"#/components/schemas/{wire.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
