"""/v1/models: the served models and the names they answer to; loading and unloading where there are several."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import Directory, ModelEntry, ServedModel, ServerContext, get_context
from vllm_mlx.api.errors import HttpError
from vllm_mlx.api.requests import json_response
from vllm_mlx.errors import UnknownModel
from vllm_mlx.generation.oneshot import BesideModel

router = APIRouter(tags=["OpenAI"])

Context = Annotated[ServerContext, Depends(get_context)]


@dataclass(frozen=True, slots=True)
class Named:
    """A name that requests may use, and the model behind it; `entry` tells more where there are several."""

    name: str
    model: ServedModel
    entry: ModelEntry | None = None


@router.get(
    "/v1/models",
    summary="List the models",
    description="Each model's id, then its aliases, then the models beside them. A server with several says of each "
    "where it is in its life.",
)
async def list_models(http: Request, context: Context) -> Response:
    names = served_names(context)
    if "anthropic-version" in http.headers:
        data = [_anthropic_model(named) for named in names]
        return json_response({"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})
    data = [_openai_model(named) for named in names]
    for one in context.beside:
        data += [_beside_model(context, one, name) for name in (one.id, *one.aliases)]
    body: dict[str, Any] = {"object": "list", "data": data}
    if "client_version" in http.query_params:
        body["models"] = []  # Codex looks for its own catalogue here; an empty one makes it ask no further.
    return json_response(body)


@router.get("/v1/models/{model_id:path}", summary="Describe a model")
async def retrieve_model(model_id: str, http: Request, context: Context) -> Response:
    if beside := context.beside.named(model_id):
        return json_response(_beside_model(context, beside[0], model_id))
    found = next((named for named in served_names(context) if named.name == model_id), None)
    if found is None:
        raise _unknown(context, model_id)
    render = _anthropic_model if "anthropic-version" in http.headers else _openai_model
    return json_response(render(found))


@router.post(
    "/v1/models/{model_id:path}/load",
    summary="Load a model",
    description="Answers when it is in memory; idle models make room for it if they must.",
)
async def load_model(model_id: str, context: Context) -> Response:
    models, id = _among_several(context, model_id)
    await models.load_model(id)
    return json_response(_described(context, id))


@router.post(
    "/v1/models/{model_id:path}/unload",
    summary="Give a model's memory back",
    description="Its running requests finish first. The next request that names it loads it again.",
)
async def unload_model(model_id: str, context: Context) -> Response:
    models, id = _among_several(context, model_id)
    entries = [*models.entries(), *models.beside_entries()]
    if any(entry.is_pinned for entry in entries if entry.model.id == id):
        raise HttpError(409, f"The model '{id}' is pinned: it stays in memory.", code="model_pinned")
    await models.unload_model(id)
    return json_response(_described(context, id))


def served_names(context: ServerContext) -> list[Named]:
    """The ids first, each with its aliases; then `default`, unless the server is strict, and the operator's aliases."""
    default = context.require_model()
    server = context.settings.server
    names: list[Named] = []
    if context.models is None:
        names.append(Named(default.id, default))
    else:
        for entry in context.models.entries():
            names += [Named(name, entry.model, entry) for name in (entry.model.id, *entry.aliases)]
    known = {named.name: named for named in names}
    for base in {named.model.id: named for named in names}.values():
        for adapter in context.adapters_of(base.model.id):
            model = base.model.with_adapter(adapter.name)
            known[model.id] = Named(model.id, model, base.entry)
    if not server.strict_model_id:
        known.setdefault("default", replace(known[default.id], name="default"))
    for alias in server.model_alias:
        name, target = alias.split("=", 1)
        if name not in known:
            known[name] = replace(known.get(target, known[default.id]), name=name)
    return list(known.values())


def _described(context: ServerContext, model_id: str) -> dict[str, Any]:
    if beside := context.beside.named(model_id):
        return _beside_model(context, beside[0], model_id)
    return _openai_model(next(named for named in served_names(context) if named.name == model_id))


def _among_several(context: ServerContext, name: str) -> tuple[Directory, str]:
    """The pool, and the id of the model of a name, chat or not."""
    if context.models is None:
        raise HttpError(
            409,
            "This server has one model, which stays loaded; it has several, or --idle-unload-seconds, where they come "
            "and go.",
            code="single_model",
        )
    context.require_service()
    if beside := context.beside.named(name):
        return context.models, beside[0].id
    model = context.models.find(name)
    if model is None:
        raise _unknown(context, name)
    return context.models, model.id


def _unknown(context: ServerContext, name: str) -> UnknownModel:
    ids = dict.fromkeys(f"'{named.model.id}'" for named in served_names(context))
    verb = "is" if len(ids) == 1 else "are"
    return UnknownModel(f"The model '{name}' is not served here; {', '.join(ids)} {verb}.", param="model")


def _openai_model(named: Named) -> dict[str, Any]:
    model, entry = named.model, named.entry
    described: dict[str, Any] = {
        "id": named.name,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm-mlx",
        "root": model.id,
        "parent": model.base_id if model.adapter else None,
        "max_model_len": model.context_tokens,
    }
    return described | _life(entry)


def _life(entry: ModelEntry | None) -> dict[str, Any]:
    """Where one of several models is in its life; nothing for a model that stays."""
    if entry is None:
        return {}
    return {
        "state": entry.state,
        "pinned": entry.is_pinned,
        "num_active": entry.num_active,
        "num_waiting": entry.num_waiting,
        "memory_bytes": entry.cost_bytes,
        "failure": entry.failure,
    }


def _beside_model(context: ServerContext, model: BesideModel, name: str) -> dict[str, Any]:
    entries = context.models.beside_entries() if context.models is not None else ()
    return {
        "id": name,
        "object": "model",
        "created": model.created,
        "owned_by": "vllm-mlx",
        "root": model.id,
        "parent": None,
        "task": model.task,
        **_life(next((entry for entry in entries if entry.model.id == model.id), None)),
    }


def _anthropic_model(named: Named) -> dict[str, Any]:
    created = datetime.fromtimestamp(named.model.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {"type": "model", "id": named.name, "display_name": named.model.id, "created_at": created}
