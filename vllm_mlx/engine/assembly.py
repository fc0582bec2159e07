"""Puts an engine together for a loaded model. Called on the MLX thread; decides sizes in bytes, nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx.engine.background import Worker
from vllm_mlx.engine.chunking import StallBoundedChunk
from vllm_mlx.engine.disk_codec import KVCodec
from vllm_mlx.engine.disk_folder import shared_folder
from vllm_mlx.engine.disk_tier import DiskTier, TierOptions
from vllm_mlx.engine.draft_model import DraftModel
from vllm_mlx.engine.engine import Engine, Publish, Runner
from vllm_mlx.engine.kv_cache import Quantization
from vllm_mlx.engine.media_cache import MediaCache
from vllm_mlx.engine.mtp_draft import MtpDraft
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.ranks import LeadRunner
from vllm_mlx.engine.runner import ModelRunner
from vllm_mlx.engine.scheduler import Limits, Scheduler
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import DraftSource, Speculator
from vllm_mlx.errors import SettingsError
from vllm_mlx.models.activations import read_activation_cost
from vllm_mlx.models.base import LanguageModel
from vllm_mlx.models.mtp import MtpTextModel

MIN_KV_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class DiskOptions:
    """`model` names everything that makes KV of equal tokens differ: weights, precision, quantisation, adapter."""

    folder: Path
    limit_bytes: int
    min_tokens: int
    model: str


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Plain values out of the settings.

    `memory_bytes` is what rows and prefix cache together may take (weights are not in it); `prefix_cache_bytes` is the
    part of it that finished prefixes may keep, 0 for no prefix cache. `activation_bytes` is what computing a prompt
    chunk may take beside both: chunks are no larger. `slack_bytes` may be spent on padding rows, rather than on more
    groups of them.
    """

    memory_bytes: int
    prefix_cache_bytes: int
    activation_bytes: int = 1 << 30
    slack_bytes: int = 16 << 20
    max_rows: int = 256
    max_tokens_per_step: int = 2048
    prefill_step: int = 512
    stall_target_s: float = 0.25
    block_size: int = 16
    checkpoint_interval: int = 2048
    kv_bits: int | None = None
    kv_group_size: int = 64
    encoder_cache_bytes: int = 256 << 20
    batch_invariant: bool = False
    seed: int | None = None
    disk: DiskOptions | None = None
    speculation: str = "off"
    num_draft_tokens: int = 16


def build_engine(
    model: LanguageModel,
    options: EngineOptions,
    publish: Publish,
    *,
    judge: Callable[[Sequence], str | None] = lambda sequence: None,
    wake: Callable[[], object] = lambda: None,
    draft_model: LanguageModel | None = None,
    lead: Callable[[ModelRunner], LeadRunner] | None = None,
) -> Engine:
    """An engine ready to step; `wake` makes its sleeping thread call `idle` again, and may be called from any thread.

    `lead` makes the runner one that other ranks follow. Raises SettingsError where the options cannot be met with this
    model.
    """
    if options.memory_bytes < MIN_KV_BYTES:
        raise SettingsError(
            f"Only {options.memory_bytes / 2**20:.0f} MiB are left for the KV cache after loading the weights; "
            f"{MIN_KV_BYTES >> 20} MiB are the least. Use a smaller or more strongly quantised model."
        )
    prefix_cache_bytes = options.prefix_cache_bytes if model.profile.shares_prefixes else 0
    runner = build_runner(model, options, speculator=_speculator(options, model, draft_model))
    # What encoders keep comes out of the same memory.
    encoder_bytes = options.encoder_cache_bytes if model.profile.is_multimodal else 0
    memory_bytes = max(MIN_KV_BYTES, options.memory_bytes - encoder_bytes)
    cache = None
    if prefix_cache_bytes:
        cache = PrefixCache(
            block_size=options.block_size,
            budget_bytes=min(prefix_cache_bytes, memory_bytes),
            needs_checkpoint=runner.needs_checkpoint,
        )
    value_bytes = 4 if model.profile.dtype == "float32" else 2
    activations = read_activation_cost(model.profile.path, value_bytes=value_bytes)
    sizer = StallBoundedChunk(
        options.stall_target_s,
        max(options.prefill_step, options.block_size),
        options.block_size,
        lambda context: activations.tokens_within(options.activation_bytes, context),
    )
    tier = _disk_tier(cache, options.disk, wake) if cache is not None and options.disk is not None else None
    outer: Runner[Any] = lead(runner) if lead is not None else runner
    scheduler = Scheduler(
        outer,
        cache,
        Limits(options.max_rows, memory_bytes),
        max_tokens_per_step=options.max_tokens_per_step,
        chunk_sizer=sizer,
        block_size=options.block_size,
        checkpoint_interval=options.checkpoint_interval,
        atomic_spans=model.atomic_spans,
        grid=runner.invariance.grid,
        keeps_answers=not runner.invariance.is_promised,
        most_rows=runner.invariance.most_rows if model.profile.interleaves else 1,
        max_draft=runner.speculator.max_draft if runner.speculator is not None else 0,
        judge=judge,
        tier=tier,
    )
    engine = Engine(scheduler, outer, publish)
    engine.on_step.append(sizer.observe)
    if runner.speculator is not None:
        engine.on_finished.append(runner.speculator.remember)
    elif draft_model is not None:
        raise SettingsError(
            f"--draft-model cannot be used with {model.profile.name}: what its layers keep cannot be taken back after "
            "a wrong guess, or it computes one request at a time. Leave the flag out."
        )
    engine.on_sharing.append(sizer.share)
    if tier is not None:
        engine.reports.append(tier.metrics)
        engine.on_stop.append(tier.stop)
    return engine


def build_runner(
    model: LanguageModel, options: EngineOptions, *, samples: bool = True, speculator: Speculator | None = None
) -> ModelRunner:
    """The runner alone; ranks that follow have no more than that, and do not sample."""
    quantization = Quantization(options.kv_bits, options.kv_group_size) if options.kv_bits else None
    keeps_prefixes = bool(options.prefix_cache_bytes and model.profile.shares_prefixes)
    try:
        return ModelRunner(
            model,
            quantization=quantization,
            media_cache=MediaCache(budget_bytes=options.encoder_cache_bytes),
            checkpoint_step=options.block_size if keeps_prefixes else 0,
            slack_bytes=min(options.slack_bytes, options.memory_bytes // 4),
            rows_bytes=max(0, options.memory_bytes - options.prefix_cache_bytes),
            is_invariant=options.batch_invariant,
            samples=samples,
            seed=options.seed,
            speculator=speculator,
        )
    except ValueError as error:
        if quantization is None:
            raise
        raise SettingsError(
            f"--kv-bits {options.kv_bits} cannot be used with {model.profile.name}: {error} Leave the flag out, "
            "or choose another --kv-group-size."
        ) from error


def _disk_tier(cache: PrefixCache, options: DiskOptions, wake: Callable[[], object]) -> DiskTier:
    writer, reader = Worker("disk writer"), Worker("disk reader")
    writer.on_news = wake
    return DiskTier(
        cache,
        shared_folder(options.folder, limit_bytes=options.limit_bytes),
        KVCodec(),
        TierOptions(
            options.model,
            options.limit_bytes,
            options.min_tokens,
            max_pending_bytes=min(256 << 20, max(32 << 20, cache.budget_bytes // 4)),
        ),
        writer=writer,
        reader=reader,
    )


def _speculator(options: EngineOptions, model: LanguageModel, draft_model: LanguageModel | None) -> Speculator | None:
    if options.speculation == "off":
        return None
    source: DraftSource | None = None
    if draft_model is not None:
        source = DraftModel(draft_model)
    elif isinstance(model, MtpTextModel):
        source = MtpDraft(model)
    return Speculator(options.num_draft_tokens, model=source)
