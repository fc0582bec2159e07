"""The OpenAPI document: FastAPI's, plus the request types that handlers read themselves, plus the error shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "description": "One sentence: what is wrong, then what to do."},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"], "description": "Path of the field, as in `messages.2.content`."},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
ANTHROPIC_ERROR = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {
            "type": "object",
            "required": ["type", "message"],
            "properties": {"type": {"type": "string"}, "message": {"type": "string"}},
        },
        "request_id": {"type": ["string", "null"]},
    },
}
STATUSES = {
    "400": "The request is wrong; the body names the field.",
    "401": "An API key is needed, or the one given is not valid.",
    "403": "The caller may not ask for this.",
    "404": "There is no such model, request or path.",
    "413": "The body is too large.",
    "429": "Too many requests; `Retry-After` says when to return.",
    "500": "The server failed.",
    "501": "A program or package that this needs is not installed; the body has the install line.",
    "503": "Nothing can be served now.",
    "504": "The request ran out of time.",
}


def install(app: FastAPI, wire_types: Sequence[type[BaseModel]]) -> None:
    """Give `app` the full document at /openapi.json; it is made once, when first asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, wire_types)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's documented way


def _document(app: FastAPI, wire_types: Sequence[type[BaseModel]]) -> dict[str, Any]:
    document = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    _, definitions = models_json_schema(
        [(wire, "validation") for wire in wire_types], ref_template="#/components/schemas/{model}"
    )
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    schemas.update(definitions.get("$defs", {}))
    schemas["Error"], schemas["AnthropicError"] = ERROR, ANTHROPIC_ERROR
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    document["components"]["securitySchemes"] = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "x-api-key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
    }
    for path, operations in document["paths"].items():
        shape = "AnthropicError" if path.startswith("/v1/messages") else "Error"
        for operation in operations.values():
            responses = operation.setdefault("responses", {})
            responses.pop("422", None)
            for status, description in STATUSES.items():
                schema = {"$ref": f"#/components/schemas/{shape}"}
                content = {"application/json": {"schema": schema}}
                responses.setdefault(status, {"description": description, "content": content})
            if path != "/health":
                operation["security"] = [{"bearer": []}, {"x-api-key": []}, {}]
    return document
