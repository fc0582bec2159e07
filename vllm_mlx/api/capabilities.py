"""GET /v1/capabilities: what this server and this model can do, computed from what is loaded and how it was started."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Annotated, Any

from fastapi import APIRouter, Depends
from starlette.responses import Response

from vllm_mlx import __version__
from vllm_mlx.api.context import ServedModel, ServerContext, get_context
from vllm_mlx.api.requests import json_response

router = APIRouter(tags=["Server"])


@router.get("/v1/capabilities", summary="What this server can do")
async def capabilities(context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    return json_response(describe(context))


def describe(context: ServerContext) -> dict[str, Any]:
    """The whole answer; every value is what a request would meet, not what was asked for."""
    model, settings = context.model, context.settings
    server, limits, guards, parsing = settings.server, settings.limits, settings.guards, settings.parsing
    modalities = model.modalities if model else frozenset()
    return {
        "object": "capabilities",
        "version": __version__,
        "model_loaded": model is not None,
        "model_name": model.id if model else None,
        "model_type": None if model is None else "mllm" if model.is_multimodal else "llm",
        "modalities": {
            "text": "text" in modalities,
            "image": "image" in modalities,
            "video": "video" in modalities,
            "audio_input": "audio" in modalities,
            "audio_output": False,  # of the chat model; speech has a model of its own
        },
        "features": {
            "streaming": True,
            "structured_output": find_spec("llguidance") is not None,
            "anthropic_messages": True,
            "request_diagnostics": True,
            "tool_calling": bool(model and model.tool_parser),
            "auto_tool_choice": parsing.enable_auto_tool_choice and bool(model and model.tool_parser),
            "reasoning": bool(model and model.reasoning_parser),
            "reasoning_configured": parsing.reasoning_parser != "none",
            "embeddings": context.beside.of_task("embedding") is not None,
            "rerank": context.beside.of_task("rerank") is not None,
            "transcription": context.beside.of_task("transcription") is not None,
            "speech": context.beside.of_task("speech") is not None,
            "mcp": context.mcp is not None,
            "mcp_in_chat": context.mcp is not None and settings.mcp.mcp_in_chat,
            "strict_model_id": server.strict_model_id,
            "prefix_cache": settings.cache.prefix_cache and (model is None or model.shares_prefixes),
            "continuous_batching": settings.batch.runtime_mode != "simple" and (model is None or model.runs_batched),
            "batch_invariant": settings.batch.batch_invariant,
            "deterministic": settings.sampling.deterministic,
            "logprobs": True,
            "multiple_choices": True,
            "tokenize": True,
            "cancel": True,
            "metrics": True,
        },
        "policies": {
            "repetition": {
                "default_mode": guards.repetition_policy,
                "supported_modes": ["safe", "strict", "off"],
                "request_override": "trusted_only",
            },
            "frequency_penalty": settings.sampling.frequency_penalty_mode,
            "memory_action": guards.memory_action,
            "batch_divergence_action": guards.batch_divergence_action if guards.batch_divergence_monitor else None,
        },
        "diagnostics": {
            "enabled": True,
            "levels": ["basic", "deep"],
            "default_level": "basic",
            "deep_supported": True,
        },
        "auth": {
            "api_key_required": bool(context.api_keys),
            "accepted_headers": ["authorization", "x-api-key"],
            "cache_isolated_by_key": bool(context.api_keys) and not server.shared_cache,
        },
        "rate_limit": {"enabled": server.rate_limit > 0, "requests_per_minute": server.rate_limit or None},
        "limits": {
            "default_max_tokens": limits.max_tokens,
            "max_request_tokens": limits.max_request_tokens,
            "default_timeout_seconds": limits.timeout_s,
            "max_context_tokens": model.max_context_tokens if model else None,
            "effective_context_tokens": model.context_tokens if model else None,
            "effective_context_source": _context_source(context),
            "max_num_seqs": settings.batch.max_num_seqs,
            "max_queue": limits.max_queue,
            "max_body_bytes": int(server.max_body_mb * 2**20),
        },
        "models_beside": [{"id": one.id, "task": one.task, "weights_bytes": one.nbytes} for one in context.beside],
        "model_traits": _traits(model) if model else None,
        "notes": list(context.notes),
    }


def _context_source(context: ServerContext) -> str | None:
    if context.model is None:
        return None
    return "operator_override" if context.settings.limits.effective_context_tokens is not None else "model_config"


def _traits(model: ServedModel) -> dict[str, Any]:
    return {
        "model_type": model.model_type,
        "architecture_type": model.architecture,
        "max_position_embeddings": model.max_context_tokens,
        "is_vlm": model.is_multimodal,
        "has_chat_template": model.has_chat_template,
        "has_thinking_tokens": model.has_thinking_tokens,
        "reasoning_mechanism": model.reasoning_parser,
        "tool_format": model.tool_parser,
        "dtype": model.dtype,
        "quantization": model.quantization,
        "vocab_size": model.vocab_size,
        "weights_bytes": model.weights_bytes,
        "revision": model.revision,
        "known_issues": list(model.notes),
        "triage_available": False,
        "triage_status": "unavailable",
        "triage_version": None,
        "triage_error": None,
    }
