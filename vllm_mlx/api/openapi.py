"""The OpenAPI document: FastAPI's, plus the request types that handlers read themselves, plus the error shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from vllm_mlx.api.auth import OPEN_PATHS
from vllm_mlx.api.errors import anthropic_type, openai_type
from vllm_mlx.api.openapi_examples import SHOWN, Shown

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
    "409": "The server or the model is in no state for this.",
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
        for method, operation in operations.items():
            shown = SHOWN.get(f"{method} {path}", Shown())
            responses = operation.setdefault("responses", {})
            responses.pop("422", None)
            if content := shown.content():
                responses["200"] = {"description": "The answer.", "content": content}
            for status in statuses_of(method, path, operation, shown):
                schema = {"$ref": f"#/components/schemas/{shape}"}
                error = {"schema": schema, "example": _example(shape, status)}
                responses.setdefault(
                    status, {"description": STATUSES[status], "content": {"application/json": error}}
                )
            if shown.request is not None and "requestBody" in operation:
                operation["requestBody"]["content"]["application/json"]["example"] = shown.request
            if path in GENERATES:
                operation["parameters"] = [*operation.get("parameters", ()), PRIORITY, SESSION]
            if path not in OPEN_PATHS:
                operation["security"] = [{"bearer": []}, {"x-api-key": []}, {}]
    return document


GENERATES = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
PRIORITY = {
    "name": "x-priority",
    "in": "header",
    "schema": {"type": "string", "enum": ["interactive", "background"]},
    "description": "Whether somebody waits for this; a whole number is taken too, and lower runs first.",
}
SESSION = {
    "name": "x-session-id",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The client's own name of the conversation, shown in /v1/requests.",
}


def statuses_of(method: str, path: str, operation: dict[str, Any], shown: Shown) -> list[str]:
    """The statuses, beside 200, with which an operation may answer."""
    found = {"500", *shown.extra_statuses}
    if path not in OPEN_PATHS:
        found |= {"401"}
    if path not in ("/metrics", "/v1/requests", "/v1/capabilities", "/v1/status", "/v1/cache/stats"):
        found |= {"503"}
    if "requestBody" in operation:
        found |= {"400", "404", "413"}
    if operation.get("parameters"):
        found |= {"400"}
    if "{" in path or path == "/v1/audio/voices":
        found |= {"404"}
    if method == "post":
        found |= {"429"}
    if path in GENERATES:
        found |= {"403", "504"}
    if path.startswith(("/v1/audio", "/v1/embeddings", "/v1/rerank", "/v2/rerank", "/v1/score")):
        found |= {"501", "504"}
    if path.startswith(("/v1/messages", "/v1/responses", "/v1/mcp/execute")):
        found |= {"504"}
    if path.endswith("lora_adapter"):
        found |= {"403", "409"}
    return sorted(found)


def _example(shape: str, status: str) -> dict[str, Any]:
    """An error as it looks."""
    message = STATUSES[status]
    if shape == "AnthropicError":
        kind = anthropic_type(int(status))
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_1"}
    param = "temperature" if status == "400" else None
    return {"error": {"message": message, "type": openai_type(int(status)), "param": param, "code": None}}
