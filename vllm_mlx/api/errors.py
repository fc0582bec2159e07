"""Every failure as an HTTP answer: status, headers, and the body of the protocol that the path belongs to.

OpenAI: `{"error": {message, type, code, param}}`; Anthropic: `{"type": "error", "error": {type, message},
"request_id"}`. Errors after the headers are sent use the same bodies in a final event.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from vllm_mlx.errors import (
    Cancelled,
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineError,
    InvalidRequest,
    MissingPiece,
    ModelLoadError,
    Overloaded,
    Unavailable,
    UnknownModel,
    VllmMlxError,
)


class HttpError(VllmMlxError):
    """An answer that only HTTP knows: authentication, rate limit, body size."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, slots=True)
class ErrorAnswer:
    """A failure, ready to be written in either protocol."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    retry_after_s: float | None = None
    anthropic_message: str | None = None
    extra_headers: Mapping[str, str] = field(default_factory=dict)

    def openai(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str | None) -> dict[str, Any]:
        message = self.anthropic_message or self.message
        if self.param and self.param not in message and self.anthropic_message is None:
            message = f"{self.param}: {message}"
        error = {"type": anthropic_type(self.status), "message": message}
        return {"type": "error", "error": error, "request_id": request_id}

    def headers(self) -> dict[str, str]:
        headers = dict(self.extra_headers)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers["www-authenticate"] = "Bearer"
        return headers


_OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    499: "request_cancelled",
    503: "service_unavailable",
    504: "timeout_error",
}
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


def anthropic_type(status: int) -> str:
    return _ANTHROPIC_TYPES.get(status, "api_error")


def openai_type(status: int) -> str:
    if status in _OPENAI_TYPES:
        return _OPENAI_TYPES[status]
    return "server_error" if status >= 500 else "invalid_request_error"


def describe(error: BaseException) -> ErrorAnswer:
    """The answer to an exception; what is not ours becomes a 500 that tells nothing of the inside."""
    match error:
        case HttpError():
            return ErrorAnswer(
                error.status, str(error), openai_type(error.status), error.code, None, error.retry_after_s
            )
        case UnknownModel():
            return ErrorAnswer(404, str(error), "invalid_request_error", "model_not_found", error.param or "model")
        case ContextLengthExceeded():
            # Agents look for these words, and shorten the conversation when they see them.
            too_long = f"prompt is too long: {error.num_prompt_tokens} tokens > {error.context_tokens} maximum"
            return ErrorAnswer(
                400, str(error), "invalid_request_error", error.code, error.param, anthropic_message=too_long
            )
        case InvalidRequest():
            return ErrorAnswer(400, str(error), "invalid_request_error", error.code, error.param)
        case Overloaded():
            return ErrorAnswer(429, str(error), "rate_limit_error", "overloaded", None, error.retry_after_s)
        case ModelLoadError():
            return ErrorAnswer(503, str(error), "service_unavailable", "model_load_failed")
        case Unavailable():
            return ErrorAnswer(503, str(error), "service_unavailable", "unavailable", None, error.retry_after_s)
        case MissingPiece():
            return ErrorAnswer(501, str(error), "not_implemented", "missing_piece")
        case DeadlineExceeded():
            return ErrorAnswer(504, str(error), "timeout_error", "timeout")
        case Cancelled():
            return ErrorAnswer(499, str(error) or "The request was cancelled.", "request_cancelled", "cancelled")
        case EngineError():
            return ErrorAnswer(500, str(error), "server_error", "engine_error")
        case HTTPException():
            kind, headers = openai_type(error.status_code), error.headers or {}
            return ErrorAnswer(error.status_code, _http_message(error), kind, extra_headers=headers)
        case ValidationError():
            return describe(invalid_from(error.errors(include_url=False, include_context=False)))
        case RequestValidationError():
            return describe(invalid_from(error.errors(), has_location=True))
        case _:
            return ErrorAnswer(500, "The server failed to answer this request; its log says why.", "server_error")


def _http_message(error: HTTPException) -> str:
    if error.status_code == 404:
        return "There is nothing at this path; GET /docs lists the paths that exist."
    if error.status_code == 405:
        return "This path does not take this HTTP method."
    return str(error.detail)


def invalid_from(errors: list[ErrorDetails] | Any, *, has_location: bool = False) -> InvalidRequest:
    """One error naming one field, from pydantic's list: the deepest, which is the most specific.

    `has_location`: FastAPI has put the part of the request (`query`, `path`) before each field.
    """
    error = max(errors, key=lambda e: len(e["loc"]))
    # Names of union branches are written in angle brackets in the schemas; they are no part of the client's path.
    path = [str(part) for part in error["loc"] if not (isinstance(part, str) and part.startswith("<"))]
    if path and path[-1] in ("str", "dict[str,any]"):
        path.pop()
    if has_location and path and path[0] in ("query", "path", "header"):
        path = path[1:]
    param = ".".join(path) or None
    if error["type"] == "missing":
        return InvalidRequest(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    code = "invalid_type" if error["type"].endswith("_type") else "invalid_value"
    where = f"'{param}'" if param else "the request body"
    return InvalidRequest(f"Invalid value for {where}: {_lower_first(reason)}.", param=param, code=code)


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


def is_anthropic(scope: Scope) -> bool:
    """Whether the caller expects Anthropic's shapes: by the path, or by the header where both protocols have one."""
    path: str = scope["path"]
    if path.startswith("/v1/models"):
        return any(name == b"anthropic-version" for name, _ in scope["headers"])
    return path.startswith("/v1/messages")


def is_rerank(path: str) -> bool:
    return path.endswith("/rerank")


def error_response(scope: Scope, error: BaseException) -> Response:
    """The whole answer, in the shape of the path's protocol."""
    answer = describe(error)
    scope.setdefault("state", {})["error"] = answer.message  # for the access line and the dashboard
    if is_anthropic(scope):
        body = answer.anthropic(request_id_of(scope))
    elif is_rerank(scope["path"]):
        # Cohere's clients read `message`, Jina's and vLLM's users expect the rest.
        body = {"message": answer.message, **answer.openai()}
    else:
        body = answer.openai()
    return Response(orjson.dumps(body), answer.status, answer.headers(), "application/json")


def request_id_of(scope: Scope) -> str | None:
    """The id that `access.RequestScope` gave this HTTP request."""
    state = scope.get("state") or {}
    return state.get("request_id")


async def _answer(request: Request, error: Exception) -> Response:
    return error_response(request.scope, error)


def install(app: FastAPI) -> None:
    """Make the application answer every known exception in its protocol's shape."""
    for kind in (VllmMlxError, HTTPException, RequestValidationError, ValidationError):
        app.add_exception_handler(kind, _answer)
