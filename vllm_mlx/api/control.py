"""What runs now, and the caches: /v1/status, /v1/requests and cancel, /v1/cache. Reads the engine's last status."""

from __future__ import annotations

import time
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import HttpError
from vllm_mlx.api.health import liveness
from vllm_mlx.api.live import LiveRequest
from vllm_mlx.api.requests import caller_of, json_response
from vllm_mlx.engine.step import EngineStatus, Progress

router = APIRouter(tags=["Server"])

Context = Annotated[ServerContext, Depends(get_context)]

GIB = 2**30


@router.get(
    "/v1/status",
    summary="What the server is doing",
    description="Totals, memory, and every request that runs or waits, with its progress.",
)
async def status(context: Context) -> Response:
    return json_response(describe_status(context))


def describe_status(context: ServerContext) -> dict[str, Any]:
    engine = context.read_status()
    word, _ = liveness(context)
    memory = context.read_memory() if context.read_memory else {}
    return {
        "status": {"healthy": "running", "unhealthy": "stopped"}.get(word, word),
        "model": context.model.id if context.model else None,
        "uptime_s": round(time.monotonic() - context.started, 3),
        "steps_executed": engine.num_steps,
        "num_running": engine.num_running,
        "num_waiting": engine.num_waiting,
        "batch_rows": engine.batch_rows,
        "total_requests_processed": context.live.num_finished,
        "total_prompt_tokens": engine.num_prompt_tokens,
        "total_completion_tokens": engine.num_completion_tokens,
        "num_preemptions": engine.num_preemptions,
        "memory": dict(memory),
        "cache": cache_stats(engine),
        "runtime": {"active_concurrency": len(context.live), "peak_concurrency": context.live.peak},
        "requests": _requests(context, engine),
    }


@router.get(
    "/v1/requests",
    summary="The requests being answered now",
    description="`session` narrows it to one conversation, by the name that the agent gives it in a header.",
)
async def list_requests(context: Context, session: str | None = None) -> Response:
    found = _requests(context, context.read_status())
    data = [request for request in found if session is None or request["session"] == session]
    return json_response({"object": "list", "data": data})


@router.post(
    "/v1/requests/{request_id}/cancel",
    summary="End a request early",
    description="`request_id` is the answer's id (`chatcmpl-…`) or its `x-request-id`. The request is answered with "
    "what was generated so far and `stop_reason: cancelled`; one to a model beside the chat with an error. With API "
    "keys, each ends its own requests.",
)
async def cancel_request(request_id: str, http: Request, context: Context) -> Response:
    request, caller = context.live.find(request_id), caller_of(http)
    is_anothers = request is not None and caller.is_authenticated and request.client != caller.name
    if request is None or is_anothers or context.service is None:
        raise HttpError(404, f"No request '{request_id}' is running.", code="request_not_found")
    if request.end is not None:
        request.cancelled_by_client = True
        request.end()
    else:
        context.live.cancel(request, context.service_of(request.base_model).cancel)
    return json_response({"id": request.id, "request_id": request.request_id, "object": "request", "cancelled": True})


@router.delete("/v1/requests/{request_id}", include_in_schema=False)
async def delete_request(request_id: str, http: Request, context: Context) -> Response:
    return await cancel_request(request_id, http, context)


@router.get("/v1/cache/stats", summary="What the prefix cache holds, and how often it helped")
async def read_cache(context: Context) -> Response:
    return json_response({"object": "cache.stats", **cache_stats(context.read_status())})


@router.delete(
    "/v1/cache", summary="Empty the prefix cache", description="What running requests hold stays until they end."
)
async def clear_cache(context: Context) -> Response:
    context.require_service()
    if context.clear_cache is None:
        raise HttpError(503, "This server has no prefix cache to clear.", code="no_cache")
    freed_bytes = await context.clear_cache()
    return json_response({"object": "cache.cleared", "status": "ok", "freed_bytes": freed_bytes})


def cache_stats(engine: EngineStatus) -> dict[str, Any]:
    lookups = engine.num_prefix_hits + engine.num_prefix_misses
    return {
        "prefix_cache_bytes": engine.prefix_cache_bytes,
        "prefix_cache_budget_bytes": engine.prefix_cache_budget_bytes,
        "kv_bytes": engine.kv_bytes,
        "kv_budget_bytes": engine.kv_budget_bytes,
        "num_hits": engine.num_prefix_hits,
        "num_misses": engine.num_prefix_misses,
        "hit_rate": round(engine.num_prefix_hits / lookups, 4) if lookups else None,
        "num_cached_tokens": engine.num_cached_tokens,
        "num_prompt_tokens": engine.num_prompt_tokens,
        "num_evictions": engine.num_evictions,
        "num_diverged": engine.num_prefix_diverged,
        "num_without_checkpoint": engine.num_without_checkpoint,
        "kv_held_ratio": engine.extra.get("kv_waste_ratio"),
        "disk": engine.extra.get("disk_cache"),
        "encoder_cache_bytes": engine.extra.get("media_cache_bytes", 0),
        "num_encoder_runs": engine.extra.get("num_encoder_runs", 0),
    }


def _requests(context: ServerContext, engine: EngineStatus) -> list[dict[str, Any]]:
    """Live requests with the engine's progress; one whose prompt is still being built is not with the engine yet."""
    progress = {item.request_id: item for item in engine.requests}
    return [
        _describe(request, generation_id, progress.get(generation_id))
        for request in context.live
        for generation_id in request.generation_ids
    ]


def _describe(request: LiveRequest, generation_id: str, progress: Progress | None) -> dict[str, Any]:
    now = time.monotonic()
    described: dict[str, Any] = {
        "request_id": generation_id,
        "id": request.id,
        "x_request_id": request.request_id,
        "route": request.route,
        "model": request.model,
        "stream": request.is_stream,
        "session": request.session or None,
        "elapsed_s": round(now - request.started, 3),
    }
    if progress is None:
        return {**described, "status": "preparing", "phase": "preparing"}
    rate = None
    if progress.first_token is not None and progress.num_completion_tokens > 1 and now > progress.first_token:
        rate = round((progress.num_completion_tokens - 1) / (now - progress.first_token), 2)
    return {
        **described,
        "status": "waiting" if progress.queue_position is not None else "running",
        "phase": progress.phase,
        "queue_position": progress.queue_position,
        "predicted_wait_s": round(progress.predicted_wait_s, 2) if progress.predicted_wait_s is not None else None,
        "prompt_tokens": progress.num_prompt_tokens,
        "computed_tokens": progress.num_computed_tokens,
        "completion_tokens": progress.num_completion_tokens,
        "max_tokens": progress.max_tokens,
        "progress": round(progress.num_completion_tokens / progress.max_tokens, 4) if progress.max_tokens else None,
        "tokens_per_second": rate,
        "ttft_s": round(progress.first_token - progress.arrived, 4) if progress.first_token is not None else None,
        "cached_tokens": progress.num_cached_tokens,
    }
