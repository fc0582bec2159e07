"""Models beside the chat as members of the pool: embedding, rerank and audio models that come and go. Composition root.

All share one place on the MLX thread and one queue of slices, so that however many there are, at most one slice stands
between two steps of the chat. They are found at start, and loaded on the MLX thread when a request needs them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_mlx import beside
from vllm_mlx.fleet.pool import Member, ModelPool
from vllm_mlx.fleet.shares import WORK_BYTES
from vllm_mlx.fleet.specs import CHAT, ModelSpec
from vllm_mlx.generation.oneshot import BesideModel, BesideModels, OneShots

if TYPE_CHECKING:
    from vllm_mlx.engine.thread import EngineThread


@dataclass(frozen=True)
class KnownBeside:
    """What is known of one whether it is loaded or not."""

    spec: ModelSpec
    source: beside.Source
    memory_bytes: int

    @property
    def cost_bytes(self) -> int:
        return self.memory_bytes + WORK_BYTES


@dataclass(eq=False)
class LoadedBeside:
    """One in memory. `service` holds its weights, which are let go on the MLX thread."""

    service: Any
    nbytes: int


def find(specs: Sequence[ModelSpec]) -> list[tuple[ModelSpec, beside.Source]]:
    """The files of those of `specs` that are no chat models; raises ModelLoadError. Blocks."""
    return [
        (spec, beside.find_one(spec.settings, spec.kind, spec.path, spec.id)) for spec in specs if spec.kind != CHAT
    ]


class BesideMembers:
    """Loads and unloads them for the pool. `jobs`: their place on the MLX thread."""

    def __init__(self, known: Sequence[KnownBeside], jobs: EngineThread, oneshots: OneShots) -> None:
        self.known: Mapping[str, KnownBeside] = {item.spec.id: item for item in known}
        self._jobs = jobs
        self.oneshots = oneshots

    def __contains__(self, member_id: str) -> bool:
        return member_id in self.known

    def open(self, member_id: str) -> LoadedBeside:
        """Load one. Blocks until the MLX thread has done it."""
        item = self.known[member_id]
        model = self._jobs.submit_job(lambda: beside.load(item.source, item.spec.settings)).result()
        service = beside.make_service(item.spec.settings, self.oneshots, item.source.task, model)
        return LoadedBeside(service, model.nbytes)

    async def drop(self, loaded: LoadedBeside) -> None:
        """Let go of its weights, whose requests have ended."""

        def let_go() -> None:
            loaded.service = None

        await self._jobs.call(let_go)

    def registry(self, pool: ModelPool[Any]) -> BesideModels:
        """As the HTTP side sees them: each is loaded for the length of a job."""
        return BesideModels(
            [
                BesideModel(
                    item.spec.id,
                    item.source.task,
                    None,
                    item.memory_bytes,
                    aliases=item.spec.aliases,
                    enter=lambda id=item.spec.id: _entered(pool, id),  # type: ignore[misc]
                )
                for item in self.known.values()
            ]
        )


@asynccontextmanager
async def _entered(pool: ModelPool[Any], member_id: str) -> AsyncIterator[Any]:
    async with pool.use(member_id) as loaded:
        yield loaded.service


def correct_cost(member: Member[Any], loaded: LoadedBeside) -> None:
    """The files told what it would take; now it is known."""
    member.cost_bytes = loaded.nbytes + WORK_BYTES
