"""Puts an engine together for a loaded model. Called on the MLX thread; decides sizes in bytes, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from vllm_mlx.engine.chunking import StallBoundedChunk
from vllm_mlx.engine.engine import Engine, Publish
from vllm_mlx.engine.kv_cache import Quantization
from vllm_mlx.engine.media_cache import MediaCache
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.runner import ModelRunner
from vllm_mlx.engine.scheduler import Limits, Scheduler
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.errors import SettingsError
from vllm_mlx.models.base import LanguageModel

MIN_KV_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Plain values out of the settings.

    `memory_bytes` is what rows and prefix cache together may take (weights are not in it); `prefix_cache_bytes` is the
    part of it that finished prefixes may keep, 0 for no prefix cache.
    """

    memory_bytes: int
    prefix_cache_bytes: int
    max_rows: int = 256
    max_tokens_per_step: int = 2048
    prefill_step: int = 512
    stall_target_s: float = 0.25
    block_size: int = 16
    checkpoint_interval: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    encoder_cache_bytes: int = 256 << 20
    seed: int | None = None


def build_engine(
    model: LanguageModel,
    options: EngineOptions,
    publish: Publish,
    *,
    judge: Callable[[Sequence], str | None] = lambda sequence: None,
) -> Engine:
    """An engine ready to step. Raises SettingsError where the options cannot be met with this model."""
    if options.memory_bytes < MIN_KV_BYTES:
        raise SettingsError(
            f"Only {options.memory_bytes / 2**20:.0f} MiB are left for the KV cache after loading the weights; "
            f"{MIN_KV_BYTES >> 20} MiB are the least. Use a smaller or more strongly quantised model."
        )
    quantization = Quantization(options.kv_bits, options.kv_group_size) if options.kv_bits else None
    try:
        runner = ModelRunner(
            model,
            quantization=quantization,
            media_cache=MediaCache(budget_bytes=options.encoder_cache_bytes),
            checkpoint_step=options.block_size if options.prefix_cache_bytes else 0,
            seed=options.seed,
        )
    except ValueError as error:
        if quantization is None:
            raise
        raise SettingsError(
            f"--kv-bits {options.kv_bits} cannot be used with {model.profile.name}: {error} Leave the flag out, "
            "or choose another --kv-group-size."
        ) from error
    cache = None
    if options.prefix_cache_bytes:
        cache = PrefixCache(
            block_size=options.block_size,
            budget_bytes=min(options.prefix_cache_bytes, options.memory_bytes),
            needs_checkpoint=runner.needs_checkpoint,
        )
    sizer = StallBoundedChunk(
        options.stall_target_s, max(options.prefill_step, options.block_size), options.block_size
    )
    scheduler = Scheduler(
        runner,
        cache,
        Limits(options.max_rows, options.memory_bytes),
        max_tokens_per_step=options.max_tokens_per_step,
        chunk_sizer=sizer,
        block_size=options.block_size,
        checkpoint_interval=options.checkpoint_interval,
        atomic_spans=model.atomic_spans,
        judge=judge,
    )
    engine = Engine(scheduler, runner, publish)
    engine.on_step.append(sizer.observe)
    engine.on_sharing.append(sizer.share)
    return engine
