"""Loading and unloading LoRA adapters while the server runs, as vLLM's routes do it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import HttpError
from vllm_mlx.api.requests import caller_of, find_model, json_response
from vllm_mlx.api.wire import WireModel
from vllm_mlx.errors import InvalidRequest, ModelLoadError
from vllm_mlx.generation.adapters import Adapter

router = APIRouter(tags=["Server"])

Context = Annotated[ServerContext, Depends(get_context)]


class LoadAdapter(WireModel):
    """`model` is the base, where the server has several."""

    lora_name: Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[^:\s]+$")]
    lora_path: Annotated[str, Field(min_length=1)]
    model: str | None = None


class UnloadAdapter(WireModel):
    lora_name: str
    model: str | None = None


@router.post(
    "/v1/load_lora_adapter",
    summary="Load a LoRA adapter",
    description="From a folder of this machine, in mlx-lm's or PEFT's form. Requests use it as model `MODEL:NAME` or "
    "by their `adapter` field. One of the same name is replaced; what runs with it finishes with it.",
    openapi_extra=json_body(LoadAdapter),
)
async def load_adapter(http: Request, context: Context) -> Response:
    body = await read_body(http, LoadAdapter)
    _check_trust(http, context)
    model = find_model(context, body.model)
    folder = Path(body.lora_path).expanduser()
    if not folder.is_absolute():
        raise InvalidRequest("'lora_path' must be an absolute path.", param="lora_path", code="invalid_value")
    try:
        adapter = await context.adapters_of(model.base_id).load(body.lora_name, folder)
    except ModelLoadError as error:  # the adapter's fault, not the server's
        raise InvalidRequest(str(error), param="lora_path", code="adapter_load_failed") from error
    return json_response(_describe(model.base_id, adapter))


@router.post(
    "/v1/unload_lora_adapter",
    summary="Unload a LoRA adapter",
    description="New requests cannot use it any more; those that run finish with it.",
    openapi_extra=json_body(UnloadAdapter),
)
async def unload_adapter(http: Request, context: Context) -> Response:
    body = await read_body(http, UnloadAdapter)
    _check_trust(http, context)
    model = find_model(context, body.model)
    registry = context.adapters_of(model.base_id)
    registry.check(body.lora_name, "lora_name")
    await registry.unload(body.lora_name)
    return json_response({"id": f"{model.base_id}:{body.lora_name}", "object": "adapter", "deleted": True})


def _check_trust(http: Request, context: ServerContext) -> None:
    """It reads files and changes what the server serves: for known callers, and those on this machine."""
    caller = caller_of(http)
    if not (caller.is_authenticated or caller.is_local):
        raise HttpError(
            403, "Adapters are loaded and unloaded by authenticated and local callers only.", code="untrusted_caller"
        )


def _describe(base_id: str, adapter: Adapter) -> dict[str, Any]:
    facts = adapter.facts
    return {
        "id": f"{base_id}:{adapter.name}",
        "object": "adapter",
        "base": base_id,
        "path": str(adapter.path),
        "rank": facts.rank,
        "num_layers": facts.num_layers,
        "bytes": facts.nbytes,
    }
