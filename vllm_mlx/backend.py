"""Everything below HTTP for one model: folder, MLX thread, engine, generation service. Part of the composition root.

`Backend.load` blocks (download, weights) and runs on a thread of its own; what it makes is used on the event loop. MLX
is imported by it and not before, because a faster BLAS must be in the process first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_mlx import __version__, beside, blas
from vllm_mlx.api.context import ServedModel, ServerContext
from vllm_mlx.errors import SettingsError
from vllm_mlx.generation.adapters import Adapter, AdapterRegistry
from vllm_mlx.generation.adapters import describe as describe_adapter
from vllm_mlx.generation.admission import Admission, Pressure
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
    from vllm_mlx.engine.disk_tier import DiskTier
    from vllm_mlx.engine.prefix_cache import PrefixCache
    from vllm_mlx.engine.thread import EngineThread, MlxThread
    from vllm_mlx.loading import Loaded
    from vllm_mlx.models.loader import LoadedModel
    from vllm_mlx.oversight import Oversight
    from vllm_mlx.ranks import Lead, Place

log = logging.getLogger(__name__)

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
        settings, profile = files.settings, files.profile
        blas_report = load_blas(settings)
        # After the BLAS: these import MLX.
        from vllm_mlx.engine.thread import EngineThread
        from vllm_mlx.loading import Loading, check_it_fits
        from vllm_mlx.models import device
        from vllm_mlx.oversight import Oversight
        from vllm_mlx.ranks import Lead

        check_it_fits(files)
        oversight = Oversight(settings, served_model(settings, profile).context_tokens or profile.context_tokens)
        if adapters is None:
            adapters = AdapterRegistry()
            adapters.begin_with(files.adapters)
        ranks = Lead(place, files, settings.model.distributed_timeout) if place is not None else None
        loading = Loading(
            files,
            oversight,
            adapters,
            wake=lambda: engine.submit_job(_nothing),
            memory_bytes=memory_bytes,
            unpack_limit_bytes=unpack_limit_bytes,
            ranks=ranks,
        )
        engine = EngineThread(loading.build, thread)
        if ranks is not None:
            ranks.on_lost = engine.abandon
        engine.start().result()

        loaded = loading.loaded
        chat, scheduler = loaded.chat, loaded.engine.scheduler
        adapters.attach(loaded.bank, engine.submit_job)
        admission = Admission(
            max_running=settings.batch.max_num_seqs, max_queue=settings.limits.max_queue, pressure=oversight.pressure
        )
        sources = media_sources(settings) if chat.media is not None else None
        oneshots = open_oneshots(settings, engine, oversight.pressure)
        return cls(
            settings=settings,
            notes=_notes(files, loaded, sources),
            model_checks=check_model(profile, chat.profile, chat.tokenizer),
            model=served_model(settings, chat.profile),
            engine=engine,
            service=_open_service(settings, engine, chat, admission, adapters, sources),
            admission=admission,
            oversight=oversight,
            blas=blas_report,
            device=device.report().backend,
            memory_bytes=loaded.options.memory_bytes,
            prefix_cache=scheduler.prefixes.cache,
            disk_tier=scheduler.disk.tier,
            adapters=adapters,
            ranks=ranks,
            oneshots=oneshots,
            beside=beside.services(settings, oneshots, loaded.beside),
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


def _open_service(
    settings: Settings,
    engine: EngineThread,
    chat: LoadedModel,
    admission: Admission,
    adapters: AdapterRegistry,
    sources: MediaSources | None,
) -> GenerationService:
    return GenerationService(
        engine=engine,
        tokenizer=chat.tokenizer,
        profile=chat.profile,
        admission=admission,
        sampling=settings.sampling,
        limits=settings.limits,
        guards=settings.guards,
        parsing=settings.parsing,
        agents=settings.agents,
        media=MediaLoader(sources) if sources is not None else None,
        expander=chat.media,
        adapters=adapters,
        grammar=GrammarCompiler.for_tokenizer(
            chat.tokenizer, vocab_size=chat.profile.vocab_size, eos_token_ids=chat.profile.eos_token_ids
        ),
    )


def open_oneshots(settings: Settings, engine: EngineThread, pressure: Callable[[], Pressure]) -> OneShots:
    """Jobs beside the chat, with a bound of their own: embedding a library does not keep chats out, nor they it."""
    return OneShots(
        engine,
        Admission(max_running=1, max_queue=settings.limits.max_queue, pressure=pressure),
        timeout_s=settings.limits.timeout_s,
        stall_target_s=settings.batch.stall_target_ms / 1000,
    )


def _notes(files: ModelFiles, loaded: Loaded, sources: MediaSources | None) -> tuple[str, ...]:
    """What the operator is told at the start, for what the loaded model alone could tell."""
    from vllm_mlx.engine.runner import ModelRunner  # imports MLX, which is loaded by now

    notes = [*files.notes, *loaded.chat.profile.notes]
    if sources is not None:
        notes.append(sources.description)
    if files.settings.batch.batch_invariant:
        assert isinstance(runner := loaded.engine.runner, ModelRunner)
        notes.append(runner.invariance.note)
    return tuple(notes)


def _nothing() -> None:
    """A job that only wakes the MLX thread."""


def media_sources(settings: Settings) -> MediaSources:
    """Where images, clips and sounds may come from, by the operator's word."""
    return MediaSources(
        allows_remote=settings.media.remote_media,
        roots=settings.media.media_root,
        is_loopback=is_loopback(settings.server.host),
    )


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
