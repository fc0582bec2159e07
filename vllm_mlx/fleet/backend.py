"""Several models behind one server: what `backend.Backend` is for one, over a pool. Part of the composition root.

`load` blocks and runs on a thread of its own: it finds every model's files, so that a wrong name or a model that can
never fit ends the start, and loads the default model and the pinned ones. The others are loaded when a request names
them. All engines step on one MLX thread. What else is here belongs to the event loop.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_mlx import beside
from vllm_mlx.api.context import Generation, ModelEntry, ServedModel, ServerContext
from vllm_mlx.backend import Backend, ModelFiles, load_blas, open_oneshots, served_model
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import EngineError, ModelLoadError
from vllm_mlx.fleet.beside import BesideMembers, KnownBeside, LoadedBeside, correct_cost, find
from vllm_mlx.fleet.generation import PooledGeneration
from vllm_mlx.fleet.pool import Member, ModelPool, ModelState
from vllm_mlx.fleet.shares import Share, divide
from vllm_mlx.fleet.specs import CHAT, ModelSpec, read_specs
from vllm_mlx.generation.adapters import AdapterRegistry
from vllm_mlx.generation.admission import NO_PRESSURE, Pressure
from vllm_mlx.guards.process_memory import process_bytes, return_to_system
from vllm_mlx.settings import Settings

if TYPE_CHECKING:
    from vllm_mlx.engine.thread import EngineThread, MlxThread

log = logging.getLogger(__name__)

BUDGET_SHARE = 0.8
"""Of the memory free at start, what the models may take where the operator names no budget."""
IDLE_POLL_S = 1.0
UNLOAD_S = 30.0


@dataclass(frozen=True)
class Known:
    """What is known of a model whether it is loaded or not."""

    spec: ModelSpec
    files: ModelFiles
    share: Share


class FleetBackend:
    """The pool with the files of its models. Implements `lifecycle.Loaded` and `api.context.Directory`."""

    def __init__(
        self,
        settings: Settings,
        known: Sequence[Known],
        known_beside: Sequence[KnownBeside],
        thread: MlxThread,
        jobs: EngineThread,
        budget_bytes: int,
    ) -> None:
        self._settings = settings
        self._known = {item.spec.id: item for item in known}
        self._models = {item.spec.id: _facts(item) for item in known}
        self._adapters = {item.spec.id: AdapterRegistry() for item in known}
        for item in known:
            self._adapters[item.spec.id].begin_with(item.files.adapters)
        self._thread = thread
        self._jobs = jobs
        self._beside = BesideMembers(known_beside, jobs, open_oneshots(settings, self._jobs, self._pressure))
        costs = [(item.spec, item.share.cost_bytes) for item in known]
        costs += [(item.spec, item.cost_bytes) for item in known_beside]
        self._pool: ModelPool[Any] = ModelPool(
            [Member(spec.id, cost_bytes, spec.is_pinned) for spec, cost_bytes in costs],
            budget_bytes=budget_bytes,
            load=self._load_member,
            unload=self._unload_member,
            idle_unload_s=settings.pool.idle_unload_seconds,
        )
        timeout_s = settings.limits.timeout_s
        self._services = {id: PooledGeneration(self._pool, id, timeout_s=timeout_s) for id in self._known}
        self._names = {name: item.spec.id for item in known for name in (item.spec.id, *item.spec.aliases)}
        self._past = EngineStatus()  # totals of engines that are gone
        self._is_draining = False
        self._watch: asyncio.Task[None] | None = None

    @classmethod
    def load(cls, settings: Settings) -> FleetBackend:
        """Find all models and load those that start loaded; raises ModelLoadError or SettingsError."""
        specs = read_specs(settings)
        chat = [spec for spec in specs if spec.kind == CHAT]
        files = [ModelFiles.fetch(spec.settings) for spec in chat]
        sources = find(specs)
        load_blas(settings)
        from vllm_mlx.engine.jobs import JobsOnly
        from vllm_mlx.engine.thread import EngineThread, MlxThread  # this and what follows import MLX: after the BLAS
        from vllm_mlx.models import device

        free_bytes = device.free_bytes()
        gib = settings.pool.memory_budget_gb
        budget_bytes = int(gib * 2**30) if gib is not None else int(free_bytes * BUDGET_SHARE)
        is_cpu = device.report().backend == "cpu"
        others = [KnownBeside(spec, source, beside.memory_bytes(source, is_cpu=is_cpu)) for spec, source in sources]
        beside_bytes = sum(item.cost_bytes for item in others)
        shares = divide(budget_bytes, [item.profile for item in files], is_cpu=is_cpu, beside_bytes=beside_bytes)
        known = [Known(*item) for item in zip(chat, files, shares, strict=True)]
        thread = MlxThread()
        jobs = EngineThread(lambda publish: JobsOnly(), thread)
        jobs.start().result()
        fleet = cls(settings, known, others, thread, jobs, budget_bytes)
        for member in fleet._pool.members.values():
            fleet._pool.check_it_can_fit(member)
        for member in fleet._pool.members.values():
            if member.id == known[0].spec.id or member.is_pinned:
                member.start_with(fleet._open(member))
        return fleet

    # ── lifecycle.Loaded ────────────────────────────────────────────────────────────────────────────────────────

    def install(self, context: ServerContext) -> None:
        """Put the parts into the context of the HTTP side, the default model's in front. Event loop."""
        default = next(iter(self._known))
        context.settings = self._known[default].files.settings
        context.notes = tuple(
            dict.fromkeys(note for item in self._known.values() for note in item.files.notes)
        )
        context.model, context.service, context.models = self._models[default], self._services[default], self
        context.beside, context.oneshots = self._beside.registry(self._pool), self._beside.oneshots
        context.read_status = self.status
        context.read_memory = self.read_memory
        context.health_checks = self.health_checks
        context.clear_cache = self.clear_cache
        for backend in self._loaded():
            backend.oversight.start(backend.engine)
        self._watch = asyncio.get_running_loop().create_task(self._watch_idle(), name="idle models")

    def describe(self) -> str:
        loaded = "; ".join(backend.describe() for backend in self._loaded())
        others = [id for id, member in self._pool.members.items() if member.state is not ModelState.READY]
        return loaded + (f"; on demand: {', '.join(others)}" if others else "")

    def start_drain(self) -> None:
        self._is_draining = True
        if self._watch is not None:
            self._watch.cancel()
        self._beside.oneshots.start_drain()
        for backend in self._loaded():
            backend.start_drain()

    def close(self, timeout_s: float) -> bool:
        are_stopped = all([backend.close(timeout_s) for backend in self._loaded()])
        self._beside.oneshots.close()
        return self._jobs.stop(timeout_s) and are_stopped

    # ── api.context.Directory ───────────────────────────────────────────────────────────────────────────────────

    def entries(self) -> Sequence[ModelEntry]:
        return [_entry(self._pool.members[id], self._models[id], item.spec) for id, item in self._known.items()]

    def beside_entries(self) -> Sequence[ModelEntry]:
        known = self._beside.known.items()
        return [_entry(self._pool.members[id], ServedModel(id), item.spec) for id, item in known]

    def find(self, name: str) -> ServedModel | None:
        found = self._names.get(name)
        return self._models[found] if found is not None else None

    def service_of(self, model_id: str) -> Generation:
        return self._services[model_id]

    def adapters_of(self, model_id: str) -> AdapterRegistry:
        return self._adapters[model_id]

    # Both named as the protocol wants; the class's own `load` starts the whole fleet.
    async def load_model(self, model_id: str) -> None:
        await self._pool.load(model_id)

    async def unload_model(self, model_id: str) -> bool:
        return await self._pool.unload(model_id)

    # ── what the server asks of all models together ─────────────────────────────────────────────────────────────

    def status(self) -> EngineStatus:
        """The engines' numbers added up; unhealthy when one is."""
        statuses = [backend.engine.status for backend in self._loaded()]
        return add_up([self._past, *statuses])

    def read_memory(self) -> Mapping[str, Any]:
        loaded = self._loaded()
        memory = dict(loaded[0].read_memory()) if loaded else {}
        beside = sum(m.loaded.nbytes for m in self._pool.members.values() if isinstance(m.loaded, LoadedBeside))
        gib = 2**30
        return {
            **memory,
            "kv_budget_gb": round(sum(backend.memory_bytes for backend in loaded) / gib, 3),
            "weights_gb": round((sum(backend.model.weights_bytes or 0 for backend in loaded) + beside) / gib, 3),
            "pool_budget_gb": round(self._pool.budget_bytes / gib, 3),
            "pool_used_gb": round(self._pool.used_bytes / gib, 3),
        }

    def health_checks(self) -> Mapping[str, Mapping[str, Any]]:
        checks: dict[str, Mapping[str, Any]] = {}
        for member in self._pool.members.values():
            if isinstance(member.loaded, Backend):
                for name, value in member.loaded.oversight.health_checks().items():
                    checks[name if not checks.get(name) else f"{name} ({member.id})"] = value
        failed = {m.id: m.failure for m in self._pool.members.values() if m.state is ModelState.FAILED}
        states = {m.id: m.state.value for m in self._pool.members.values()}
        detail = "; ".join(f"{id}: {why}" for id, why in failed.items()) or "all models can be loaded or are"
        checks["models"] = {"status": "warning" if failed else "pass", "detail": detail, "metadata": states}
        return checks

    async def clear_cache(self) -> int:
        """Drop every prefix nobody uses, of all loaded models; returns the bytes that became free."""
        return sum([await backend.clear_cache() for backend in self._loaded() if backend.prefix_cache is not None])

    # ── loading and unloading ───────────────────────────────────────────────────────────────────────────────────

    def _loaded(self) -> list[Backend]:
        """The chat models in memory."""
        return [member.loaded for member in self._pool.members.values() if isinstance(member.loaded, Backend)]

    def _pressure(self) -> Pressure:
        """What memory means for jobs beside the chat: as any of the loaded models' guards says."""
        found = (backend.oversight.pressure() for backend in self._loaded())
        return next((pressure for pressure in found if pressure.rejects_new), NO_PRESSURE)

    def _open(self, member: Member[Any]) -> Backend | LoadedBeside:
        """Load a member. Blocks."""
        if member.id in self._beside:
            loaded = self._beside.open(member.id)
            correct_cost(member, loaded)
            return loaded
        item = self._known[member.id]
        return Backend.open(
            item.files,
            thread=self._thread,
            memory_bytes=item.share.kv_bytes,
            unpack_limit_bytes=item.share.weights_bytes,
            adapters=self._adapters[item.spec.id],
        )

    async def _load_member(self, member: Member[Any]) -> Backend | LoadedBeside:
        if self._is_draining:
            raise ModelLoadError("The server is shutting down and loads no models any more.")
        backend = await asyncio.to_thread(self._open, member)
        if isinstance(backend, LoadedBeside):
            return backend
        # Now everything is known of it, also what only the loaded weights tell.
        self._models[member.id] = dataclasses.replace(backend.model, id=member.id)
        backend.oversight.start(backend.engine)
        return backend

    async def _unload_member(self, member: Member[Any], backend: Backend | LoadedBeside) -> None:
        before = process_bytes()
        if isinstance(backend, LoadedBeside):
            await self._beside.drop(backend)
        else:
            status = backend.engine.status
            backend.start_drain()
            if not await asyncio.to_thread(backend.close, UNLOAD_S):
                raise EngineError(f"{member.id} is stuck in a step and cannot be unloaded.")
            self._past = add_up([self._past, _totals(status)])
        del backend
        await asyncio.to_thread(_collect)
        await self._jobs.call(_release)  # MLX's own cache of buffers
        log.info("unloaded %s: %.0f MiB became free", member.id, (before - process_bytes()) / 2**20)

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_POLL_S)
            await self._pool.unload_idle()


def _entry(member: Member[Any], model: ServedModel, spec: ModelSpec) -> ModelEntry:
    return ModelEntry(
        model,
        spec.aliases,
        member.state.value,
        member.is_pinned,
        member.num_active,
        len(member.waiting),
        member.cost_bytes,
        member.failure,
    )


def _facts(item: Known) -> ServedModel:
    """What is known of a model from its files, under the pool's name for it."""
    model = served_model(item.files.settings, item.files.profile)
    return dataclasses.replace(model, id=item.spec.id)


def add_up(statuses: Sequence[EngineStatus]) -> EngineStatus:
    """One status for several engines: counts and bytes are sums, health is the worst, `extra` the last one's."""
    sums = {
        item.name: sum(getattr(status, item.name) for status in statuses)
        for item in dataclasses.fields(EngineStatus)
        if isinstance(item.default, int) and not isinstance(item.default, bool)
    }
    return EngineStatus(
        is_healthy=all(status.is_healthy for status in statuses),
        failure=next((status.failure for status in statuses if status.failure), None),
        requests=tuple(request for status in statuses for request in status.requests),
        extra={name: value for status in statuses for name, value in status.extra.items()},
        **sums,
    )


TOTALS = (
    "num_steps", "num_prefix_hits", "num_prefix_misses", "num_cached_tokens", "num_prompt_tokens",
    "num_completion_tokens", "num_preemptions", "num_evictions", "num_failed_steps",
)  # fmt: skip


def _totals(status: EngineStatus) -> EngineStatus:
    """Of an engine that is gone, what counts on: a counter must never go back."""
    return EngineStatus(**{name: getattr(status, name) for name in TOTALS})


def _collect() -> None:
    """Let go of the model's cycles; after loading, the heap may have been frozen, which keeps them out of sight."""
    gc.unfreeze()
    gc.collect()
    return_to_system()


def _release() -> None:
    from vllm_mlx.models import device  # imports MLX, which is loaded by now

    device.release_cached()
