"""Loading one model: what the MLX thread does before its first step, from the weights to the engine. Composition root.

MLX is imported by it, so it is imported once a faster BLAS is in the process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx import beside
from vllm_mlx.backend import ModelFiles
from vllm_mlx.engine.assembly import DiskOptions, EngineOptions, build_engine
from vllm_mlx.engine.engine import Engine, Publish
from vllm_mlx.engine.ranks import LeadBank, LeadRunner
from vllm_mlx.generation.adapters import AdapterRegistry, Bank
from vllm_mlx.guards.memory import check_weights
from vllm_mlx.models import device, loader
from vllm_mlx.models.base import LanguageModel
from vllm_mlx.models.loader import LoadedModel
from vllm_mlx.models.profile import ModelProfile, read_profile
from vllm_mlx.oversight import Oversight
from vllm_mlx.ranks import Lead, splitter
from vllm_mlx.settings import Settings

# Of the memory that is free once the weights are loaded, what rows and prefix cache may take; the rest is for
# activations, media and everybody else on the machine.
KV_SHARE = 0.8
MIN_PREFIX_CACHE_BYTES = 100 << 20
# What may be spent on padding rather than on one more group of rows. A group costs a GPU some 2 ms of launches a step
# (docs/benchmarks/gpu.md), in which it reads more than 512 MiB; a CPU next to nothing. CUDA attention reads no padding.
SLACK_BYTES = {"cpu": 16 << 20, "metal": 512 << 20, "cuda": 8 << 30}
MIN_ACTIVATION_BYTES = 64 << 20
# Freed buffers that MLX may keep for reuse on a CPU, where the memory is everybody's.
CPU_CACHED_BYTES = 128 << 20


@dataclass(frozen=True)
class Loaded:
    """What was made on the MLX thread and others need to know of. It holds the model, which must go with the engine."""

    chat: LoadedModel
    bank: Bank
    beside: Sequence[tuple[beside.Source, Any]]
    options: EngineOptions
    engine: Engine


class Loading:
    """`build` does it, once. `memory_bytes` is what rows and prefix cache may take, by default a share of what is free.

    `wake` wakes the sleeping MLX thread; `ranks` as in `Backend.open`: this process is rank 0 of several.
    """

    def __init__(
        self,
        files: ModelFiles,
        oversight: Oversight,
        adapters: AdapterRegistry,
        *,
        wake: Callable[[], object],
        memory_bytes: int | None = None,
        unpack_limit_bytes: int | None = None,
        ranks: Lead | None = None,
    ) -> None:
        self._files = files
        self._settings = files.settings
        self._oversight = oversight
        self._adapters = adapters
        self._wake = wake
        self._memory_bytes = memory_bytes
        self._unpack_limit_bytes = unpack_limit_bytes
        self._ranks = ranks
        self._loaded: Loaded | None = None

    @property
    def loaded(self) -> Loaded:
        assert self._loaded is not None, "build comes first"
        return self._loaded

    def build(self, publish: Publish) -> Engine:
        """The engine, ready to step. MLX thread."""
        # All weights before the memory that is left is shared out.
        chat = self._load_chat()
        if self._ranks is None:
            self._adapters.bring_back(chat.model.adapters.load)
        others = [(source, beside.load(source, self._settings)) for source in self._files.beside]
        draft = self._load_draft()
        options = self._share_memory()
        if self._ranks is not None:
            self._ranks.gather(options)
        engine = self._build_engine(chat, draft, options, publish)
        self._loaded = Loaded(chat, self._bank_of(chat, engine), others, options, engine)
        return self._oversight.attach(engine)

    def _load_chat(self) -> LoadedModel:
        model, files, is_ranked = self._settings.model, self._files, self._ranks is not None
        return loader.load(
            files.folder,
            mllm=model.mllm,
            dtype=model.dtype,
            trust_remote_code=model.trust_remote_code,
            unpack_limit_bytes=self._unpack_limit_bytes,
            split=splitter(files) if is_ranked else None,
            with_head=self._settings.speculation.speculation == "auto" and files.draft is None and not is_ranked,
        )

    def _load_draft(self) -> LanguageModel | None:
        if self._files.draft is None:
            return None
        return loader.load(self._files.draft, mllm=False, dtype=self._settings.model.dtype).model

    def _share_memory(self) -> EngineOptions:
        """Divide what the weights have left, and tell MLX how many freed buffers it may keep of it."""
        backend = device.report().backend
        options = engine_options(self._settings, device.free_bytes(), self._memory_bytes, backend=backend)
        most_cached = options.activation_bytes
        device.bound_cache(min(most_cached, CPU_CACHED_BYTES) if backend == "cpu" else most_cached)
        return options

    def _build_engine(
        self, chat: LoadedModel, draft: LanguageModel | None, options: EngineOptions, publish: Publish
    ) -> Engine:
        engine = build_engine(
            chat.model,
            dataclasses.replace(options, disk=disk_options(self._settings, chat.profile)),
            publish,
            judge=self._oversight.judge,
            wake=self._wake,
            draft_model=draft,
            lead=self._ranks.lead if self._ranks is not None else None,
        )
        engine.on_idle.append(device.IdleRelease(lambda: engine.num_steps))
        return engine

    def _bank_of(self, chat: LoadedModel, engine: Engine) -> Bank:
        """The model's adapters; with other ranks one that tells them, and only then are those of the flags loaded."""
        if not isinstance(runner := engine.runner, LeadRunner):
            return chat.model.adapters
        bank = LeadBank(chat.model.adapters, runner.say)
        self._adapters.bring_back(bank.load)
        return bank


def check_it_fits(files: ModelFiles) -> None:
    """Raise where the weights of all that is to be loaded are more than the guards would allow."""
    weights_bytes = files.profile.weights_bytes + sum(source.weights_bytes for source in files.beside)
    weights_bytes += read_profile(files.draft).weights_bytes if files.draft is not None else 0
    check_weights(weights_bytes, device.capacity_bytes(), files.settings.guards.memory_limit_threshold)


def engine_options(
    settings: Settings, free_bytes: int, memory_bytes: int | None = None, *, backend: str = "cpu"
) -> EngineOptions:
    """The engine's plain values out of the settings and the memory that is left beside the weights."""
    cache, batch = settings.cache, settings.batch
    if memory_bytes is None:
        memory_bytes = int(free_bytes * KV_SHARE)
    if not cache.prefix_cache:
        prefix_cache_bytes = 0
    elif cache.cache_memory_mb is not None:
        prefix_cache_bytes = cache.cache_memory_mb << 20
    else:
        prefix_cache_bytes = max(MIN_PREFIX_CACHE_BYTES, int(free_bytes * cache.cache_memory_percent))
    return EngineOptions(
        memory_bytes=memory_bytes,
        prefix_cache_bytes=prefix_cache_bytes,
        # What rows and prefixes leave is halved between activations and buffers kept for reuse.
        activation_bytes=max(MIN_ACTIVATION_BYTES, int(memory_bytes / KV_SHARE * (1 - KV_SHARE) / 2)),
        slack_bytes=SLACK_BYTES[backend],
        max_rows=batch.max_num_seqs,
        max_tokens_per_step=batch.max_batch_tokens,
        prefill_step=batch.prefill_step_size,
        stall_target_s=batch.stall_target_ms / 1000,
        block_size=cache.block_size,
        kv_bits=cache.kv_bits,
        kv_group_size=cache.kv_group_size,
        encoder_cache_bytes=settings.media.encoder_cache_mb << 20,
        batch_invariant=settings.batch.batch_invariant,
        seed=0 if settings.sampling.deterministic else None,
        speculation=settings.speculation.speculation,
        num_draft_tokens=settings.speculation.num_draft_tokens,
    )


def disk_options(settings: Settings, profile: ModelProfile) -> DiskOptions | None:
    """Where the prefix cache's second tier lives, and the name under which this model's blocks are found there."""
    cache = settings.cache
    if cache.disk_cache is None or not cache.prefix_cache:
        return None
    precision = f"{profile.dtype}, kv {f'{cache.kv_bits}-bit/{cache.kv_group_size}' if cache.kv_bits else 'plain'}"
    if settings.batch.batch_invariant:
        precision += ", batch-invariant"  # computed in other pieces, so equal only to itself
    return DiskOptions(
        folder=Path(cache.disk_cache).expanduser(),
        limit_bytes=int(cache.disk_cache_gb * 2**30),
        min_tokens=cache.disk_cache_min_tokens,
        model=f"{profile.name} {profile.fingerprint} ({precision}, blocks of {cache.block_size})",
    )
