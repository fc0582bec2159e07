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

from vllm_mlx.api.context import Generation, ModelEntry, ServedModel, ServerContext
from vllm_mlx.backend import Backend, ModelFiles, load_blas, served_model
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import EngineError, ModelLoadError
from vllm_mlx.fleet.generation import PooledGeneration
from vllm_mlx.fleet.pool import Member, ModelPool, ModelState
from vllm_mlx.fleet.shares import Share, divide
from vllm_mlx.fleet.specs import ModelSpec, read_specs
from vllm_mlx.generation.adapters import AdapterRegistry
from vllm_mlx.guards.process_memory import process_bytes, return_to_system
from vllm_mlx.settings import Settings

if TYPE_CHECKING:
    from vllm_mlx.engine.thread import MlxThread

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

    def __init__(self, settings: Settings, known: Sequence[Known], thread: MlxThread, budget_bytes: int) -> None:
        self._settings = settings
        self._known = {item.spec.id: item for item in known}
        self._models = {item.spec.id: _facts(item) for item in known}
        self._adapters = {item.spec.id: AdapterRegistry() for item in known}
        for item in known:
            self._adapters[item.spec.id].begin_with(item.files.adapters)
        self._thread = thread
        self._pool: ModelPool[Backend] = ModelPool(
            [Member(item.spec.id, item.share.cost_bytes, item.spec.is_pinned) for item in known],
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
        files = [ModelFiles.fetch(spec.settings) for spec in specs]
        load_blas(settings)
        from vllm_mlx.engine.thread import MlxThread  # this and what follows import MLX: after the BLAS
        from vllm_mlx.models import device

        free_bytes = device.free_bytes()
        gib = settings.pool.memory_budget_gb
        budget_bytes = int(gib * 2**30) if gib is not None else int(free_bytes * BUDGET_SHARE)
        shares = divide(budget_bytes, [item.profile for item in files], is_cpu=device.report().backend == "cpu")
        known = [Known(*item) for item in zip(specs, files, shares, strict=True)]
        fleet = cls(settings, known, MlxThread(), budget_bytes)
        for item in known:
            fleet._pool.check_it_can_fit(fleet._pool.members[item.spec.id])
        for item in known:
            if item is known[0] or item.spec.is_pinned:
                fleet._pool.members[item.spec.id].start_with(fleet._open(item))
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
        first = self._pool.members[default].loaded
        assert first is not None, "the default model starts loaded"
        context.beside, context.oneshots = first.beside, first.oneshots
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
        for backend in self._loaded():
            backend.start_drain()

    def close(self, timeout_s: float) -> bool:
        return all([backend.close(timeout_s) for backend in self._loaded()])

    # ── api.context.Directory ───────────────────────────────────────────────────────────────────────────────────

    def entries(self) -> Sequence[ModelEntry]:
        return [
            ModelEntry(
                self._models[member.id],
                self._known[member.id].spec.aliases,
                member.state.value,
                member.is_pinned,
                member.num_active,
                len(member.waiting),
                member.cost_bytes,
                member.failure,
            )
            for member in self._pool.members.values()
        ]

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
        gib = 2**30
        return {
            **memory,
            "kv_budget_gb": round(sum(backend.memory_bytes for backend in loaded) / gib, 3),
            "weights_gb": round(sum(backend.model.weights_bytes or 0 for backend in loaded) / gib, 3),
            "pool_budget_gb": round(self._pool.budget_bytes / gib, 3),
            "pool_used_gb": round(self._pool.used_bytes / gib, 3),
        }

    def health_checks(self) -> Mapping[str, Mapping[str, Any]]:
        checks: dict[str, Mapping[str, Any]] = {}
        for member in self._pool.members.values():
            if member.loaded is not None:
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
        return [member.loaded for member in self._pool.members.values() if member.loaded is not None]

    def _open(self, item: Known) -> Backend:
        return Backend.open(
            item.files,
            thread=self._thread,
            memory_bytes=item.share.kv_bytes,
            unpack_limit_bytes=item.share.weights_bytes,
            adapters=self._adapters[item.spec.id],
        )

    async def _load_member(self, member: Member[Backend]) -> Backend:
        if self._is_draining:
            raise ModelLoadError("The server is shutting down and loads no models any more.")
        backend = await asyncio.to_thread(self._open, self._known[member.id])
        # Now everything is known of it, also what only the loaded weights tell.
        self._models[member.id] = dataclasses.replace(backend.model, id=member.id)
        backend.oversight.start(backend.engine)
        return backend

    async def _unload_member(self, member: Member[Backend], backend: Backend) -> None:
        before = process_bytes()
        status = backend.engine.status
        backend.start_drain()
        if not await asyncio.to_thread(backend.close, UNLOAD_S):
            raise EngineError(f"{member.id} is stuck in a step and cannot be unloaded.")
        self._past = add_up([self._past, _totals(status)])
        del backend
        await asyncio.to_thread(_collect)
        others = self._loaded()
        if others:
            await others[0].engine.call(_release)  # MLX's own cache of buffers
        else:
            await asyncio.to_thread(_release)
        log.info("unloaded %s: %.0f MiB became free", member.id, (before - process_bytes()) / 2**20)

    async def _watch_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_POLL_S)
            await self._pool.unload_idle()


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
