"""Numbers that are read when Prometheus asks: the engine's last status under vLLM's names, and our own beside them."""

from __future__ import annotations

from collections.abc import Mapping

from vllm_mlx.api.context import ServerContext


def read(context: ServerContext) -> Mapping[str, tuple[str, float]]:
    """Name → (help, value). Tokens looked up and found are vLLM's measure of the prefix cache."""
    status = context.read_status()
    usage = status.kv_bytes / status.kv_budget_bytes if status.kv_budget_bytes else 0.0
    return {
        "vllm:num_requests_running": ("Sequences being computed.", status.num_running),
        "vllm:num_requests_waiting": ("Sequences waiting for a row or for memory.", status.num_waiting),
        "vllm:kv_cache_usage_perc": ("Share of the KV budget in use; 1 is all of it.", usage),
        "vllm:prompt_tokens_total": ("Prompt tokens processed.", status.num_prompt_tokens),
        "vllm:generation_tokens_total": ("Completion tokens generated.", status.num_completion_tokens),
        "vllm:prefix_cache_queries_total": ("Prompt tokens looked up in the prefix cache.", status.num_prompt_tokens),
        "vllm:prefix_cache_hits_total": ("Prompt tokens found in the prefix cache.", status.num_cached_tokens),
        "vllm:num_preemptions_total": ("Sequences sent back to waiting.", status.num_preemptions),
        "vllm_mlx:engine_steps_total": ("Steps of the engine.", status.num_steps),
        "vllm_mlx:engine_failed_steps_total": ("Steps that failed.", status.num_failed_steps),
        "vllm_mlx:prefix_cache_bytes": ("Bytes held by the prefix cache.", status.prefix_cache_bytes),
        "vllm_mlx:prefix_cache_evictions_total": ("Evictions from the prefix cache.", status.num_evictions),
        "vllm_mlx:batch_rows": ("Rows of the last step.", status.batch_rows),
        "vllm_mlx:http_requests_live": ("Generation requests being answered.", len(context.live)),
        "vllm_mlx:engine_healthy": ("1 while the engine is healthy.", float(status.is_healthy)),
    }
