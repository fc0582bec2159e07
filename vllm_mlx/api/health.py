"""GET /health, /health/ready, /health/live (always open, never touch the engine thread), /health/diagnostics, /metrics.

Ready: new requests may be sent here. Live: the process is worth keeping; who watches it restarts one that is not.
"""

from __future__ import annotations

import time
from collections.abc import Container, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from vllm_mlx import __version__
from vllm_mlx.api.context import Phase, ServerContext, get_context
from vllm_mlx.api.requests import json_response
from vllm_mlx.observability.metrics import CONTENT_TYPE

router = APIRouter(tags=["Server"])

Context = Annotated[ServerContext, Depends(get_context)]

SERVES = ("healthy",)
LIVES = ("healthy", "loading", "draining")


def liveness(context: ServerContext) -> tuple[str, str | None]:
    """Status word and, when it is not `healthy`, the reason."""
    match context.phase:
        case Phase.LOADING:
            return "loading", "the model is loading"
        case Phase.DRAINING:
            return "draining", "the server is shutting down"
        case Phase.FAILED:
            return "unhealthy", context.failure
    status = context.read_status()
    return ("healthy", None) if status.is_healthy else ("unhealthy", status.failure)


@router.head("/health", include_in_schema=False)
@router.get(
    "/health",
    summary="Whether the server can serve",
    description="200 when it can; 503 while loading, shutting down, or after the engine failed. Needs no key.",
)
async def health(context: Context) -> Response:
    model = context.model
    facts = {
        "model_loaded": model is not None,
        "model_name": model.id if model else None,
        "model_type": None if model is None else "mllm" if model.is_multimodal else "llm",
        "engine_type": "simple" if context.settings.batch.runtime_mode == "simple" else "batched",
        "version": __version__,
        "uptime_s": round(time.monotonic() - context.started, 3),
        "mcp": None,
    }
    return _probe(context, SERVES, facts)


@router.head("/health/ready", include_in_schema=False)
@router.get(
    "/health/ready",
    summary="Whether new requests may be sent here",
    description="For balancers: 200 when they may; 503 while loading, shutting down, or after the engine failed.",
)
async def ready(context: Context) -> Response:
    return _probe(context, SERVES)


@router.head("/health/live", include_in_schema=False)
@router.get(
    "/health/live",
    summary="Whether the process should be kept",
    description="For whoever restarts it: 200 also while loading and while shutting down; 503 after the engine failed.",
)
async def live(context: Context) -> Response:
    return _probe(context, LIVES)


def _probe(context: ServerContext, good: Container[str], facts: Mapping[str, Any] | None = None) -> Response:
    """The answer to a probe that is content with the status words `good`."""
    status, reason = liveness(context)
    body = {"status": status, **(facts or {}), **({"reason": reason} if reason else {})}
    return json_response(body, 200 if status in good else 503)


@router.get(
    "/health/diagnostics",
    summary="Every check there is, with its evidence",
    description="`status` is the worst of the checks: any fail is unhealthy, any warning degraded. Always 200.",
)
async def diagnostics(context: Context) -> Response:
    return json_response(describe_diagnostics(context))


def describe_diagnostics(context: ServerContext) -> dict[str, Any]:
    checks = {"engine": _engine_check(context), "version": _version_check(), **_more_checks(context)}
    statuses = {check["status"] for check in checks.values()}
    return {
        "status": "unhealthy" if "fail" in statuses else "degraded" if "warning" in statuses else "healthy",
        "model": context.model.id if context.model else None,
        "checks": checks,
        "memory": dict(context.read_memory()) if context.read_memory else None,
        "program": dict(context.program) if context.program is not None else None,
        "notes": list(context.notes),
        "timestamp": datetime.now(UTC).isoformat(),
    }


def check(status: str, detail: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """One entry of `checks`."""
    return {"status": status, "detail": detail, "metadata": dict(metadata) if metadata is not None else None}


def _more_checks(context: ServerContext) -> dict[str, Any]:
    if context.health_checks is None:
        return {}
    return {name: dict(value) for name, value in context.health_checks().items()}


def _engine_check(context: ServerContext) -> dict[str, Any]:
    word, reason = liveness(context)
    status = context.read_status()
    metadata = {
        "num_steps": status.num_steps,
        "num_failed_steps": status.num_failed_steps,
        "num_running": status.num_running,
        "num_waiting": status.num_waiting,
        "num_preemptions": status.num_preemptions,
    }
    if word != "healthy":
        return check("fail", reason or word, metadata)
    if status.num_failed_steps:
        return check("warning", f"{status.num_failed_steps} steps have failed since the start", metadata)
    return check("pass", "the engine is healthy", metadata)


def _version_check() -> dict[str, Any]:
    versions: dict[str, str | None] = {"vllm-mlx": __version__}
    for name in ("mlx", "mlx-lm", "mlx-vlm", "transformers", "fastapi", "uvicorn"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return check("pass", ", ".join(f"{name} {v}" for name, v in versions.items() if v), versions)


@router.get("/metrics", summary="Numbers for Prometheus", description="vLLM's metric names where the meaning is equal.")
async def metrics(context: Context) -> Response:
    return Response(context.metrics.render(), headers={"content-type": CONTENT_TYPE})
