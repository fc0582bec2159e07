"""Everything below HTTP for one model: folder, MLX thread, engine, generation service. Part of the composition root.

`Backend.load` blocks (download, weights) and runs on a thread of its own; what it makes is used on the event loop. MLX
is imported by it and not before, because a faster BLAS must be in the process first.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mlx import __version__, beside, blas
from vllm_mlx.api.context import ServedModel, ServerContext
from vllm_mlx.errors import SettingsError
from vllm_mlx.generation.adapters import Adapter, AdapterRegistry, Bank
from vllm_mlx.generation.adapters import describe as describe_adapter
from vllm_mlx.generation.admission import Admission
from vllm_mlx.generation.grammar import GrammarCompiler
from vllm_mlx.generation.media import MediaLoader
from vllm_mlx.generation.oneshot import BesideModels, OneShots
from vllm_mlx.generation.service import GenerationService
from vllm_mlx.generation.sources import MediaSources
from vllm_mlx.guards import open_files
from vllm_mlx.models.checks import check_model
from vllm_mlx.models.download import Bar, resolve
from vllm_mlx.models.profile import ModelProfile, read_profile
from vllm_mlx.parsers import discover
from vllm_mlx.settings import Settings, is_loopback
from vllm_mlx.tune import profile as tuned

if TYPE_CHECKING:
    from vllm_mlx.engine.assembly import DiskOptions, EngineOptions
    from vllm_mlx.engine.disk_tier import DiskTier
    from vllm_mlx.engine.engine import Engine
    from vllm_mlx.engine.prefix_cache import PrefixCache
    from vllm_mlx.engine.thread import EngineThread, MlxThread
    from vllm_mlx.models.loader import LoadedModel
    from vllm_mlx.oversight import Oversight
    from vllm_mlx.ranks import Lead, Place

log = logging.getLogger(__name__)

# Of the memory that is free once the weights are loaded, what rows and prefix cache may take; the rest is for
# activations, media and everybody else on the machine.
KV_SHARE = 0.8
MIN_PREFIX_CACHE_BYTES = 100 << 20
# What may be spent on padding rather than on one more group of rows. A group costs a GPU some 2 ms of launches a step
# (docs/benchmarks/gpu.md), in which it reads more than this; a CPU next to nothing.
CPU_SLACK_BYTES, GPU_SLACK_BYTES = 16 << 20, 512 << 20
MIN_ACTIVATION_BYTES = 64 << 20
# Freed buffers that MLX may keep for reuse on a CPU, where the memory is everybody's.
CPU_CACHED_BYTES = 128 << 20
DISK_CLOSE_S = 3.0
"""How long the prefixes that are not on disk yet may take to be written when the model goes."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine's disk: its folder and facts, and the settings and notes that follow from them."""

    settings: Settings
    notes: tuple[str, ...]
    folder: Path
    profile: ModelProfile
    beside: Sequence[beside.Source] = ()
    adapters: Sequence[Adapter] = ()
    draft: Path | None = None

    @classmethod
    def fetch(cls, settings: Settings) -> ModelFiles:
        """Find or download the model. What can be known without MLX comes first: a wrong name should fail at once."""
        model = settings.model

        def find(name: str, revision: str | None = None) -> Path:
            return resolve(
                name,
                offline=model.offline,
                revision=revision,
                timeout_s=model.download_timeout,
                retries=model.download_retries,
                progress=Bar(name),
            )

        folder = find(model.model, model.revision)
        profile = read_profile(folder)
        settings, notes = tuned.apply(settings, profile).resolve(profile)
        named = (adapter.partition("=") for adapter in model.adapter)
        adapters = [describe_adapter(name.strip(), find(path.strip())) for name, _, path in named]
        draft = beside.find_draft(settings, folder)
        return cls(name_formats(settings, profile), notes, folder, profile, beside.find(settings), adapters, draft)


@dataclass
class Backend:
    """A loaded model and what serves it. `settings` are resolved against the model."""

    settings: Settings
    notes: tuple[str, ...]
    model_checks: Mapping[str, Mapping[str, Any]]
    model: ServedModel
    engine: EngineThread
    service: GenerationService
    admission: Admission
    oversight: Oversight
    blas: blas.BlasReport
    device: str
    memory_bytes: int
    prefix_cache: PrefixCache | None
    disk_tier: DiskTier | None
    adapters: AdapterRegistry
    ranks: Lead | None
    oneshots: OneShots
    beside: BesideModels

    @classmethod
    def load(cls, settings: Settings, place: Place | None = None) -> Backend:
        """Fetch and load the model; raises ModelLoadError or SettingsError, one sentence each. `place`: as rank 0 of
        several processes."""
        return cls.open(ModelFiles.fetch(settings), place=place)

    @classmethod
    def open(
        cls,
        files: ModelFiles,
        *,
        thread: MlxThread | None = None,
        memory_bytes: int | None = None,
        unpack_limit_bytes: int | None = None,
        adapters: AdapterRegistry | None = None,
        place: Place | None = None,
    ) -> Backend:
        """Load a model whose files are here. `thread` is shared with other models, `memory_bytes` what rows and prefix
        cache may take, `adapters` outlive it; all three are this model's alone when not given."""
        settings, folder, profile, model = files.settings, files.folder, files.profile, files.settings.model
        blas_report = load_blas(settings)
        # After the BLAS: these import MLX.
        from vllm_mlx.engine.assembly import build_engine
        from vllm_mlx.engine.engine import Publish
        from vllm_mlx.engine.ranks import LeadBank, LeadRunner
        from vllm_mlx.engine.runner import ModelRunner
        from vllm_mlx.engine.thread import EngineThread
        from vllm_mlx.guards.memory import check_weights
        from vllm_mlx.models import device, loader
        from vllm_mlx.oversight import Oversight
        from vllm_mlx.ranks import Lead, splitter

        weights_bytes = profile.weights_bytes + sum(source.weights_bytes for source in files.beside)
        weights_bytes += read_profile(files.draft).weights_bytes if files.draft is not None else 0
        check_weights(weights_bytes, device.capacity_bytes(), settings.guards.memory_limit_threshold)
        oversight = Oversight(settings, served_model(settings, profile).context_tokens or profile.context_tokens)
        loaded: list[LoadedModel] = []
        options: list[EngineOptions] = []
        engines: list[Engine] = []
        banks: list[Bank] = []
        loaded_beside: list[tuple[beside.Source, Any]] = []

        if adapters is None:
            adapters = AdapterRegistry()
            adapters.begin_with(files.adapters)
        registry = adapters
        ranks = Lead(place, files, settings.model.distributed_timeout) if place is not None else None

        def build(publish: Publish) -> Engine:
            loaded.append(
                loader.load(
                    folder,
                    mllm=model.mllm,
                    dtype=model.dtype,
                    trust_remote_code=model.trust_remote_code,
                    unpack_limit_bytes=unpack_limit_bytes,
                    split=splitter(files) if ranks is not None else None,
                    with_head=settings.speculation.speculation == "auto" and files.draft is None and ranks is None,
                )
            )
            # All weights before the memory that is left is shared out.
            banks.append(loaded[0].model.adapters)
            if ranks is None:
                registry.bring_back(banks[0].load)
            loaded_beside.extend((source, beside.load(source, settings)) for source in files.beside)
            draft_model = None
            if files.draft is not None:
                draft_model = loader.load(files.draft, mllm=False, dtype=model.dtype).model
            is_cpu = device.report().backend == "cpu"
            options.append(engine_options(settings, device.free_bytes(), memory_bytes, is_cpu=is_cpu))
            most_cached = options[0].activation_bytes
            device.bound_cache(min(most_cached, CPU_CACHED_BYTES) if is_cpu else most_cached)
            if ranks is not None:
                ranks.gather(options[0])
            built = dataclasses.replace(options[0], disk=disk_options(settings, loaded[0].profile))
            engines.append(
                build_engine(
                    loaded[0].model,
                    built,
                    publish,
                    judge=oversight.judge,
                    wake=lambda: engine.submit_job(_nothing),
                    draft_model=draft_model,
                    lead=ranks.lead if ranks is not None else None,
                )
            )
            if isinstance(lead := engines[0].runner, LeadRunner):
                banks[0] = LeadBank(banks[0], lead.say)
                registry.bring_back(banks[0].load)
            engines[0].on_idle.append(device.IdleRelease())
            return oversight.attach(engines[0])

        engine = EngineThread(build, thread)
        if ranks is not None:
            ranks.on_lost = engine.abandon
        engine.start().result()
        adapters.attach(banks[0], engine.submit_job)
        admission = Admission(
            max_running=settings.batch.max_num_seqs, max_queue=settings.limits.max_queue, pressure=oversight.pressure
        )
        sources = media_sources(settings) if loaded[0].media is not None else None
        service = GenerationService(
            engine=engine,
            tokenizer=loaded[0].tokenizer,
            profile=loaded[0].profile,
            admission=admission,
            sampling=settings.sampling,
            limits=settings.limits,
            guards=settings.guards,
            parsing=settings.parsing,
            agents=settings.agents,
            media=MediaLoader(sources) if sources is not None else None,
            expander=loaded[0].media,
            adapters=adapters,
            grammar=GrammarCompiler.for_tokenizer(
                loaded[0].tokenizer,
                vocab_size=loaded[0].profile.vocab_size,
                eos_token_ids=loaded[0].profile.eos_token_ids,
            ),
        )
        oneshots = OneShots(
            engine,
            # A bound of its own: embedding a library does not keep chats out, nor they it.
            Admission(max_running=1, max_queue=settings.limits.max_queue, pressure=oversight.pressure),
            timeout_s=settings.limits.timeout_s,
            stall_target_s=settings.batch.stall_target_ms / 1000,
        )
        notes = (*files.notes, *loaded[0].profile.notes, *([sources.description] if sources is not None else ()))
        if settings.batch.batch_invariant:
            assert isinstance(runner := engines[0].runner, ModelRunner)
            notes = (*notes, runner.invariance.note)
        return cls(
            settings=settings,
            notes=notes,
            model_checks=check_model(profile, loaded[0].profile, loaded[0].tokenizer),
            model=served_model(settings, loaded[0].profile),
            engine=engine,
            service=service,
            admission=admission,
            oversight=oversight,
            blas=blas_report,
            device=device.report().backend,
            memory_bytes=options[0].memory_bytes,
            prefix_cache=engines[0].scheduler.cache,
            disk_tier=engines[0].scheduler.disk.tier,
            adapters=adapters,
            ranks=ranks,
            oneshots=oneshots,
            beside=beside.services(settings, oneshots, loaded_beside),
        )

    def install(self, context: ServerContext) -> None:
        """Put the parts into the context of the HTTP side. Event loop."""
        context.settings, context.notes = self.settings, self.notes
        context.model, context.service = self.model, self.service
        context.adapters = self.adapters
        context.beside, context.oneshots = self.beside, self.oneshots
        context.read_status = lambda: self.engine.status
        context.read_memory = self.read_memory
        context.health_checks = self.health_checks
        context.clear_cache = self.clear_cache if self.prefix_cache is not None else None
        self.oversight.start(self.engine)

    def health_checks(self) -> Mapping[str, Mapping[str, Any]]:
        """Entries of `/health/diagnostics`: what was found of the model, and what the guards say now."""
        return {**self.model_checks, **self.oversight.health_checks()}

    def describe(self) -> str:
        model = self.model
        facts = [model.model_type, model.quantization, model.dtype, f"{(model.weights_bytes or 0) / 2**30:.2f} GiB"]
        computed = f"on {self.device}" + (f" with {self.blas}" if self.device == "cpu" else "")
        others = "".join(f", {one.id} for {one.task}" for one in self.beside)
        return f"{model.id} ({', '.join(str(f) for f in facts if f)}){others} {computed}"

    def start_drain(self) -> None:
        self.oversight.stop()
        self.admission.start_drain()
        self.oneshots.start_drain()

    def read_memory(self) -> Mapping[str, Any]:
        """The memory part of `/v1/status` and of the diagnostics."""
        from vllm_mlx.models import device  # imports MLX, which is loaded by now

        report = device.report()
        gib = 2**30
        return {
            "backend": report.backend,
            "active_gb": round(report.active_bytes / gib, 3),
            "peak_gb": round(report.peak_bytes / gib, 3),
            "cache_gb": round(report.cached_bytes / gib, 3),
            "kv_budget_gb": round(self.memory_bytes / gib, 3),
            "weights_gb": round((self.model.weights_bytes or 0) / gib, 3),
            **self.oversight.memory.report(),
        }

    async def clear_cache(self) -> int:
        """Drop every prefix nobody uses, and give the memory back; returns the bytes that became free."""
        from vllm_mlx.models import device  # imports MLX, which is loaded by now

        cache = self.prefix_cache
        assert cache is not None

        def clear() -> int:
            freed = cache.clear()
            device.release_cached()
            return freed

        return await self.engine.call(clear)

    def close(self, timeout_s: float) -> bool:
        """End what runs, the MLX thread and the worker threads; False if the thread is stuck in a step."""
        self.adapters.detach()
        if self.ranks is not None:
            self.ranks.closes = True
        is_stopped = self.engine.stop(timeout_s)
        if is_stopped and self.disk_tier is not None and not self.disk_tier.join(DISK_CLOSE_S):
            log.warning("the disk cache was not written to its end")
        self.service.close()
        self.oneshots.close()
        return is_stopped


def load_blas(settings: Settings) -> blas.BlasReport:
    """The BLAS that MLX will use; before MLX is imported. A second call answers with the first one's report.

    Raises VllmMlxError where importing mlx-lm would fail.
    """
    open_files.check()
    return blas.load(
        settings.cpu.blas,
        settings.cpu.blas_threads,
        few_row_kernels=settings.cpu.few_row_kernels,
        invariant=settings.batch.batch_invariant,
    )


def media_sources(settings: Settings) -> MediaSources:
    """Where images, clips and sounds may come from, by the operator's word."""
    return MediaSources(
        allows_remote=settings.media.remote_media,
        roots=settings.media.media_root,
        is_loopback=is_loopback(settings.server.host),
    )


def engine_options(
    settings: Settings, free_bytes: int, memory_bytes: int | None = None, *, is_cpu: bool = True
) -> EngineOptions:
    """The engine's plain values out of the settings and the memory that is left beside the weights."""
    from vllm_mlx.engine.assembly import EngineOptions  # imports MLX

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
        slack_bytes=CPU_SLACK_BYTES if is_cpu else GPU_SLACK_BYTES,
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
    from vllm_mlx.engine.assembly import DiskOptions  # imports MLX

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


def _nothing() -> None:
    """A job that only wakes the MLX thread."""


def name_formats(settings: Settings, profile: ModelProfile) -> Settings:
    """Settings whose parsers are named formats, or `none`: `auto` is decided by the chat template, once."""
    template, tokens = profile.chat_template, profile.special_tokens
    reasoning, tools = settings.parsing.reasoning_parser, settings.parsing.tool_call_parser
    if reasoning == "auto":
        reasoning = discover.choose_reasoning_format(template, tokens) or "none"
    if tools == "auto":
        tools = discover.choose_tool_format(template, tokens) or "none"
    return settings.with_values(parsing__reasoning_parser=reasoning, parsing__tool_call_parser=tools)


def check_formats(settings: Settings) -> None:
    """Raise SettingsError for a parser that does not exist: before a model is fetched, and without MLX."""
    for flag, name, find in (
        ("--reasoning-parser", settings.parsing.reasoning_parser, discover.find_reasoning_format),
        ("--tool-call-parser", settings.parsing.tool_call_parser, discover.find_tool_format),
    ):
        if name not in ("auto", "none"):
            try:
                find(name)
            except KeyError as error:
                raise SettingsError(f"{flag}: {error.args[0]}.") from error


def served_model(settings: Settings, profile: ModelProfile) -> ServedModel:
    """What clients may know of the model."""
    context = min(n for n in (profile.context_tokens, settings.limits.effective_context_tokens) if n is not None)
    quantization = profile.quantization
    return ServedModel(
        id=settings.server.served_model_name or settings.model.model,
        fingerprint=f"vllm-mlx-{__version__}-{profile.fingerprint[:8]}",
        created=int((profile.path / "config.json").stat().st_mtime),
        model_type=profile.model_type,
        architecture=profile.architectures[0] if profile.architectures else None,
        dtype=profile.dtype,
        quantization=f"{quantization.get('bits')}-bit" if quantization and quantization.get("bits") else None,
        context_tokens=context,
        max_context_tokens=profile.context_tokens,
        vocab_size=profile.vocab_size,
        modalities=profile.modalities,
        has_chat_template=profile.chat_template is not None,
        has_thinking_tokens=settings.parsing.reasoning_parser != "none",
        reasoning_parser=_named(settings.parsing.reasoning_parser),
        tool_parser=_named(settings.parsing.tool_call_parser),
        weights_bytes=profile.weights_bytes,
        revision=profile.path.name if profile.path.parent.name == "snapshots" else f"contents {profile.fingerprint}",
        notes=profile.notes,
        runs_batched=profile.runs_batched,
        shares_prefixes=profile.shares_prefixes,
    )


def _named(name: str) -> str | None:
    return None if name == "none" else name
