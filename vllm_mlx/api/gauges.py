"""Numbers that are read when Prometheus asks: the engine's last status under vLLM's names, and our own beside them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm_mlx import __version__
from vllm_mlx.api.context import ServerContext
from vllm_mlx.observability.metrics import Reading

LEVELS = {"normal": 0, "elevated": 1, "critical": 2}


def read(context: ServerContext) -> Iterator[Reading]:
    """The values of now. With several models, what the engines share is summed under the model name `all`."""
    model = "" if context.model is None else context.model.id if context.models is None else "all"
    for name, help_text, value in (*_engine(context), *_cache(context), *_memory(context), *_guards(context)):
        if value is not None:
            yield Reading(name, help_text, float(value), {"model_name": model} if name.startswith("vllm:") else {})
    yield Reading("vllm_mlx:info", "What serves.", 1.0, {"version": __version__, "model_name": model})
    for kind, count in sorted(_metadata(context, "repetition").get("interventions", {}).items()):
        yield Reading(
            "vllm_mlx:repetition_interventions_total", "Answers ended in a loop, by its kind.", count, {"kind": kind}
        )
    for entry in context.models.entries() if context.models else ():
        labels = {"model_name": entry.model.id, "state": entry.state}
        yield Reading("vllm_mlx:model_state", "1 for the state each model is in.", 1.0, labels)


Row = tuple[str, str, Any]


def _engine(context: ServerContext) -> Iterator[Row]:
    """Tokens looked up and found are vLLM's measure of the prefix cache."""
    status = context.read_status()
    usage = status.kv_bytes / status.kv_budget_bytes if status.kv_budget_bytes else 0.0
    yield "vllm:num_requests_running", "Sequences being computed.", status.num_running
    yield "vllm:num_requests_waiting", "Sequences waiting for a row or for memory.", status.num_waiting
    yield "vllm:kv_cache_usage_perc", "Share of the KV budget in use; 1 is all of it.", usage
    yield "vllm:prompt_tokens_total", "Prompt tokens processed.", status.num_prompt_tokens
    yield "vllm:generation_tokens_total", "Completion tokens generated.", status.num_completion_tokens
    yield "vllm:prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.", status.num_prompt_tokens
    yield "vllm:prefix_cache_hits_total", "Prompt tokens found in the prefix cache.", status.num_cached_tokens
    yield "vllm:num_preemptions_total", "Sequences sent back to waiting.", status.num_preemptions
    yield "vllm_mlx:engine_steps_total", "Steps of the engine.", status.num_steps
    yield "vllm_mlx:engine_failed_steps_total", "Steps that failed.", status.num_failed_steps
    yield "vllm_mlx:engine_healthy", "1 while the engine is healthy.", status.is_healthy
    yield "vllm_mlx:batch_rows", "Rows of the last step.", status.batch_rows
    yield "vllm_mlx:kv_bytes", "Bytes of keys and values that sequences hold.", status.kv_bytes
    yield "vllm_mlx:kv_budget_bytes", "Bytes of keys and values there may be.", status.kv_budget_bytes
    yield "vllm_mlx:prefix_cache_bytes", "Bytes held by the prefix cache.", status.prefix_cache_bytes
    yield "vllm_mlx:prefix_cache_budget_bytes", "Bytes it may hold.", status.prefix_cache_budget_bytes
    yield "vllm_mlx:prefix_cache_hit_requests_total", "Requests that found a prefix.", status.num_prefix_hits
    yield "vllm_mlx:prefix_cache_miss_requests_total", "Requests that found none.", status.num_prefix_misses
    yield "vllm_mlx:prefix_cache_evictions_total", "Evictions from the prefix cache.", status.num_evictions
    drafted, accepted = status.extra.get("num_draft_tokens"), status.extra.get("num_accepted_tokens")
    yield "vllm:spec_decode_num_draft_tokens_total", "Tokens guessed ahead.", drafted
    yield "vllm:spec_decode_num_accepted_tokens_total", "Guesses that were what the model chose.", accepted
    saved = status.extra.get("draft_seconds_saved")
    yield "vllm_mlx:spec_decode_seconds_saved", "Time that guesses saved, less what they cost.", saved
    yield "vllm_mlx:http_requests_live", "Generation requests being answered.", len(context.live)


def _cache(context: ServerContext) -> Iterator[Row]:
    """Why prompts missed, what rows hold, and the disk tier where there is one."""
    status = context.read_status()
    held, disk = status.extra.get("kv_held_bytes"), status.extra.get("disk_cache")
    yield (
        "vllm_mlx:prefix_cache_diverged_total",
        "Prompts that left the cached path before their end.",
        status.num_prefix_diverged,
    )
    yield (
        "vllm_mlx:prefix_cache_without_checkpoint_total",
        "Prompts that matched further than the nearest whole-state checkpoint.",
        status.num_without_checkpoint,
    )
    yield "vllm_mlx:kv_held_bytes", "Bytes that rows hold for vllm_mlx:kv_bytes of tokens.", held
    if not isinstance(disk, Mapping):
        return
    yield "vllm_mlx:disk_cache_usable", "1 while the folder can be written.", disk["fault"] is None
    yield "vllm_mlx:disk_cache_bytes", "Bytes of the disk cache's folder.", disk["bytes"]
    yield "vllm_mlx:disk_cache_blocks", "Blocks in it.", disk["num_blocks"]
    yield "vllm_mlx:disk_cache_restored_tokens_total", "Tokens read, not computed.", disk["num_restored_tokens"]
    yield "vllm_mlx:disk_cache_written_bytes_total", "Bytes written.", disk["written_bytes"]
    yield "vllm_mlx:disk_cache_damaged_total", "Damaged blocks passed over.", disk["num_damaged"]
    yield "vllm_mlx:disk_cache_swaps_total", "Preempted sequences whose KV was written.", disk["num_swaps"]


def _memory(context: ServerContext) -> Iterator[Row]:
    memory = context.read_memory() if context.read_memory else {}
    yield "vllm_mlx:memory_process_bytes", "Memory of this process.", memory.get("process_bytes")
    yield "vllm_mlx:memory_capacity_bytes", "Memory it may have.", memory.get("process_capacity_bytes")
    yield "vllm_mlx:memory_device_bytes", "Memory held on the device.", memory.get("device_bytes")
    yield "vllm_mlx:memory_utilization_percent", "What the guard compares.", memory.get("utilization_pct")
    level = LEVELS.get(str(memory.get("pressure")))
    yield "vllm_mlx:memory_pressure", "0 normal, 1 over the warning, 2 over the limit.", level
    yield "vllm_mlx:memory_warnings_total", "Times over the warning threshold.", memory.get("times_elevated")
    yield "vllm_mlx:memory_limits_total", "Times over the limit threshold.", memory.get("times_critical")
    yield "vllm_mlx:memory_rejects_new", "1 while new requests are refused.", memory.get("rejects_new")


def _guards(context: ServerContext) -> Iterator[Row]:
    divergence, rows = _metadata(context, "batch_divergence"), _metadata(context, "runtime_mode")
    yield "vllm_mlx:divergence_agreement", "Share of equal tokens in the last replays.", divergence.get("agreement")
    yield "vllm_mlx:divergence_probes_total", "Requests replayed alone.", divergence.get("sample_count")
    yield "vllm_mlx:divergence_failed_probes_total", "Replays that failed.", divergence.get("failed_probes")
    yield "vllm_mlx:divergence_serializes", "1 while it forces one row.", divergence.get("serialize_active")
    yield "vllm_mlx:scheduler_row_limit", "Rows a step may have now.", rows.get("row_limit")
    yield "vllm_mlx:scheduler_peak_concurrency", "Most requests at one time.", rows.get("peak_concurrency")
    yield "vllm_mlx:scheduler_widenings_total", "Times `auto` began to batch.", rows.get("times_widened")


def _metadata(context: ServerContext, name: str) -> Mapping[str, Any]:
    """A guard's own numbers, as the diagnostics show them."""
    checks = context.health_checks() if context.health_checks else {}
    return checks.get(name, {}).get("metadata") or {}
