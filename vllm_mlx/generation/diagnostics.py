"""What `include_diagnostics` shows of one generation. Plain data for people; names follow the operator guide's.

The top level is the basic form; `runtime` is the server's inner state, for the deep form. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import CacheReport, EngineStatus, Timings
from vllm_mlx.generation.admission import Admission
from vllm_mlx.generation.defaults import Provenance
from vllm_mlx.generation.prompt import BuiltPrompt


def describe(
    *,
    request: Request,
    built: BuiltPrompt,
    provenance: Provenance,
    arrived: float,
    submitted: float,
    finished: float,
    timings: Timings | None,
    cache: CacheReport | None,
    max_batch_rows: int,
    num_completion_tokens: int,
    notes: Sequence[str],
    status: EngineStatus,
    admission: Admission,
    max_context_tokens: int,
    formats: Mapping[str, str | None],
) -> dict[str, Any]:
    num_prompt = len(request.prompt)
    used = num_prompt + num_completion_tokens
    return {
        "max_context_tokens": max_context_tokens,
        "effective_context_tokens": built.context.tokens,
        "effective_context_source": built.context.source,
        "context_utilization_pct": round(100 * used / built.context.tokens, 2),
        "visual_inputs": built.num_images + built.num_videos,
        "visual_token_estimate": built.num_media_tokens,
        "visual_phase": _visual_phase(built, 100 * used / built.context.tokens),
        "max_tokens": request.max_tokens,
        "timings_ms": _timings(arrived, submitted, finished, timings),
        "cache": _cache(cache, num_prompt, built),
        "sampling": {**provenance, "logit_bias": {"value": len(request.sampling.logit_bias), "source": "request"}},
        "parser_notes": list(notes),
        "runtime": {
            "max_batch_rows": max_batch_rows,
            "num_running": status.num_running,
            "num_waiting": status.num_waiting,
            "permits_held": admission.num_held,
            "kv_bytes": status.kv_bytes,
            "kv_budget_bytes": status.kv_budget_bytes,
            "prefix_cache_bytes": status.prefix_cache_bytes,
            "memory_pressure": admission.pressure.reason or "normal",
            "reasoning_parser": formats.get("reasoning"),
            "tool_call_parser": formats.get("tools"),
            "is_constrained": request.make_constraint is not None,
            "max_thinking_tokens": request.thinking.max_tokens if request.thinking else None,
            "repetition_policy": request.repetition_policy,
            "seed": request.sampling.seed,
            **status.extra,
        },
    }


def _visual_phase(built: BuiltPrompt, utilization_pct: float) -> str:
    """The operator's rule of thumb: answers about pictures get worse as the context fills."""
    if not built.num_images + built.num_videos:
        return "unknown"
    return "stable" if utilization_pct < 70 else "instability" if utilization_pct < 90 else "collapse"


def _timings(arrived: float, submitted: float, finished: float, timings: Timings | None) -> dict[str, float | None]:
    admitted = timings.admitted if timings else None
    first = timings.first_token if timings else None
    end = (timings.finished if timings else None) or finished
    return {
        "prepare": _ms(arrived, submitted),
        "queue": _ms(submitted, admitted),
        "prefill": _ms(admitted, first),
        "time_to_first_token": _ms(arrived, first),
        "decode": _ms(first, end),
        "total": _ms(arrived, finished),
    }


def _ms(start: float | None, end: float | None) -> float | None:
    return None if start is None or end is None else round(max(0.0, end - start) * 1000, 3)


def _cache(cache: CacheReport | None, num_prompt: int, built: BuiltPrompt) -> dict[str, Any]:
    if cache is None:
        return {"cached_tokens": None, "prompt_tokens": num_prompt}
    report: dict[str, Any] = {
        "cached_tokens": cache.num_cached_tokens,
        "prompt_tokens": num_prompt,
        "matched_tokens": cache.num_matched_tokens,
        "miss_reason": cache.miss_reason,
    }
    if cache.num_matched_tokens < num_prompt:
        report["first_new_token"] = cache.num_matched_tokens
        report["first_new_message"] = built.message_at(cache.num_matched_tokens)
    return report
