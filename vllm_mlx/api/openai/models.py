"""GET /v1/models and /v1/models/{id}: the served model and the names it also answers to."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import ServedModel, ServerContext, get_context
from vllm_mlx.api.requests import json_response
from vllm_mlx.errors import UnknownModel
from vllm_mlx.generation.oneshot import BesideModel

router = APIRouter(tags=["OpenAI"])

Context = Annotated[ServerContext, Depends(get_context)]


@router.get(
    "/v1/models",
    summary="List the models",
    description="The served model's id, then its aliases, then the models beside it.",
)
async def list_models(http: Request, context: Context) -> Response:
    model = context.require_model()
    names = served_names(context, model)
    if "anthropic-version" in http.headers:
        data = [_anthropic_model(model, name) for name in names]
        return json_response({"data": data, "has_more": False, "first_id": names[0], "last_id": names[-1]})
    data = [_openai_model(model, name) for name in names] + [_beside_model(one) for one in context.beside]
    body: dict[str, Any] = {"object": "list", "data": data}
    if "client_version" in http.query_params:
        body["models"] = []  # Codex looks for its own catalogue here; an empty one makes it ask no further.
    return json_response(body)


@router.get("/v1/models/{model_id:path}", summary="Describe a model")
async def retrieve_model(model_id: str, http: Request, context: Context) -> Response:
    model = context.require_model()
    if beside := context.beside.named(model_id):
        return json_response(_beside_model(beside[0]))
    if model_id not in served_names(context, model):
        raise UnknownModel(f"The model '{model_id}' is not served here; '{model.id}' is.", param="model")
    render = _anthropic_model if "anthropic-version" in http.headers else _openai_model
    return json_response(render(model, model_id))


def served_names(context: ServerContext, model: ServedModel) -> list[str]:
    """The id first; then `default`, unless the server is strict, and the operator's aliases."""
    server = context.settings.server
    aliases = [alias.split("=", 1)[0] for alias in server.model_alias]
    names = [model.id, *([] if server.strict_model_id else ["default"]), *aliases]
    return list(dict.fromkeys(names))


def _openai_model(model: ServedModel, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm-mlx",
        "root": model.id,
        "parent": None,
        "max_model_len": model.context_tokens,
    }


def _beside_model(model: BesideModel) -> dict[str, Any]:
    return {
        "id": model.id,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm-mlx",
        "root": model.id,
        "parent": None,
        "task": model.task,
    }


def _anthropic_model(model: ServedModel, name: str) -> dict[str, Any]:
    created = datetime.fromtimestamp(model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": name, "display_name": model.id, "created_at": created}
