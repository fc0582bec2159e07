"""Which models are in memory: loads on demand, unloads the least recently used idle ones, refuses what cannot fit.

    unloaded ─ use ─► loading ─► ready ─ room is needed, idle time is up, or asked ─► unloading ─► unloaded
                         └ fails ─► failed (the next use tries again)

Decides in bytes and knows nothing of models: what loading is, `load` and `unload` say. One change at a time, in the
order of asking. A model that others wait to replace takes no new requests, so a busy one cannot starve them; those
requests wait until it is loaded again. asyncio thread only.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Generic, TypeVar

from vllm_mlx.errors import ModelLoadError, VllmMlxError

log = logging.getLogger(__name__)

T = TypeVar("T")


class ModelState(StrEnum):
    """Where a model of the pool is in its life."""

    UNLOADED = "unloaded"
    LOADING = "loading"
    READY = "ready"
    UNLOADING = "unloading"
    FAILED = "failed"


@dataclass(eq=False)
class Member(Generic[T]):
    """One model. `cost_bytes`: what it takes when loaded, its weights and the keys and values it may hold."""

    id: str
    cost_bytes: int
    is_pinned: bool = False
    state: ModelState = ModelState.UNLOADED
    loaded: T | None = None
    failure: str | None = None
    num_active: int = 0
    waiting: list[asyncio.Future[None]] = field(default_factory=list)
    last_used: float = 0.0
    num_loads: int = 0
    loading: asyncio.Task[None] | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    def start_with(self, loaded: T) -> None:
        """Begin as a model that is loaded already."""
        self.loaded, self.state, self.num_loads = loaded, ModelState.READY, 1

    @property
    def is_in_memory(self) -> bool:
        return self.state in (ModelState.LOADING, ModelState.READY, ModelState.UNLOADING)


class ModelPool(Generic[T]):
    """`budget_bytes` bounds the cost of all that is in memory. `load` may take long and may raise; so may `unload`."""

    def __init__(
        self,
        members: Iterable[Member[T]],
        *,
        budget_bytes: int,
        load: Callable[[Member[T]], Awaitable[T]],
        unload: Callable[[Member[T], T], Awaitable[None]],
        idle_unload_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.members = {member.id: member for member in members}
        self.budget_bytes = budget_bytes
        self._load = load
        self._unload = unload
        self._idle_unload_s = idle_unload_s
        self._clock = clock
        self._changing = asyncio.Lock()

    @property
    def used_bytes(self) -> int:
        return sum(member.cost_bytes for member in self.members.values() if member.is_in_memory)

    @contextlib.asynccontextmanager
    async def use(self, member_id: str) -> AsyncIterator[T]:
        """The loaded model, for the length of the block; loads it first. Raises ModelLoadError when that fails."""
        member = self.members[member_id]
        await self._enter(member)
        try:
            assert member.loaded is not None
            yield member.loaded
        finally:
            self._leave(member)

    async def load(self, member_id: str) -> None:
        """Have the model in memory, or raise ModelLoadError."""
        async with self.use(member_id):
            pass

    async def unload(self, member_id: str) -> bool:
        """Let running requests finish and give the memory back. False when the model was not in memory."""

        async def take_out(member: Member[T]) -> bool:
            async with self._changing:
                if member.state is not ModelState.READY:
                    return False
                await self._take_out(member)
                return True

        # A task of its own: half an unload would leave a model that nobody can use.
        return await asyncio.shield(asyncio.create_task(take_out(self.members[member_id])))

    async def unload_idle(self) -> Sequence[str]:
        """Unload what nobody has used for `idle_unload_s`, the pinned ones aside; the ids of what went."""
        gone = []
        for member in self.members.values():
            if self._idle_unload_s is not None and self._is_idle(member) and not member.is_pinned:
                if self._clock() - member.last_used >= self._idle_unload_s and not self._changing.locked():
                    async with self._changing:
                        await self._take_out(member)
                    gone.append(member.id)
        return gone

    async def _enter(self, member: Member[T]) -> None:
        if member.state is ModelState.READY:
            self._admit(member)
            return
        self.check_it_can_fit(member)
        ticket: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        member.waiting.append(ticket)
        if member.loading is None:
            # A task of its own: a client that leaves must not end the load for the others.
            member.loading = asyncio.create_task(self._bring_in(member), name=f"load {member.id}")
        try:
            await ticket
        except asyncio.CancelledError:
            if ticket.done() and not ticket.cancelled() and ticket.exception() is None:
                self._leave(member)  # admitted in the same moment
            raise

    def _admit(self, member: Member[T]) -> None:
        member.num_active += 1
        member.idle.clear()

    def _leave(self, member: Member[T]) -> None:
        member.num_active -= 1
        member.last_used = self._clock()
        if not member.num_active:
            member.idle.set()

    # ── changes, one at a time ──────────────────────────────────────────────────────────────────────────────────

    async def _bring_in(self, member: Member[T]) -> None:
        """Load, and admit in the same moment all who wait: the next change must not find the model idle before them."""
        error: Exception | None = None
        async with self._changing:
            try:
                await self._load_into(member)
            except VllmMlxError as known:
                error = known
            except Exception as other:  # whatever foreign loading code raises; the waiting get it as one sentence
                log.exception("%s could not be loaded", member.id)
                error = ModelLoadError(f"{member.id} could not be loaded: {type(other).__name__}: {other}")
            member.loading = None
            waiting, member.waiting = member.waiting, []
            if error is None:
                member.state, member.last_used = ModelState.READY, self._clock()
                member.num_loads += 1
            else:
                member.state, member.failure = ModelState.FAILED, str(error)
            for ticket in waiting:
                if ticket.done():
                    continue  # that client has left
                if error is None:
                    self._admit(member)
                    ticket.set_result(None)
                else:
                    ticket.set_exception(error)

    async def _load_into(self, member: Member[T]) -> None:
        await self._make_room(member)
        member.state, member.failure = ModelState.LOADING, None
        log.info("loading %s", member.id)
        member.loaded = await self._load(member)

    async def _make_room(self, member: Member[T]) -> None:
        while self.used_bytes + member.cost_bytes > self.budget_bytes:
            # Idle ones first, then the one that was idle last: it finishes what runs and takes nothing new.
            candidates = [m for m in self.members.values() if m.state is ModelState.READY and not m.is_pinned]
            await self._take_out(min(candidates, key=lambda m: (not self._is_idle(m), m.last_used)))

    async def _take_out(self, member: Member[T]) -> None:
        assert member.state is ModelState.READY and member.loaded is not None
        member.state = ModelState.UNLOADING  # from here on, new requests wait
        await member.idle.wait()
        loaded, member.loaded = member.loaded, None
        log.info("unloading %s", member.id)
        try:
            await self._unload(member, loaded)
        finally:
            member.state = ModelState.UNLOADED

    def _is_idle(self, member: Member[T]) -> bool:
        return member.state is ModelState.READY and not member.num_active

    def check_it_can_fit(self, member: Member[T]) -> None:
        """Refuse at once what no unloading can make room for."""
        pinned = sum(m.cost_bytes for m in self.members.values() if m.is_pinned and m is not member)
        if member.cost_bytes + pinned > self.budget_bytes:
            beside = f" beside the {_gib(pinned)} of pinned models" if pinned else ""
            raise ModelLoadError(
                f"{member.id} needs {_gib(member.cost_bytes)} and can never fit the budget of "
                f"{_gib(self.budget_bytes)}{beside}; raise --memory-budget-gb or use a smaller version."
            )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
