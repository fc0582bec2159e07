"""Which models are in memory, on loads and unloads that only take note. No time passes but the clock's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest

from vllm_mlx.errors import ModelLoadError
from vllm_mlx.fleet.pool import Member, ModelPool, ModelState


class World:
    """A pool of models with made-up sizes; `log` is what was loaded and unloaded, in order."""

    def __init__(self, budget: int, **sizes: int) -> None:
        self.log: list[str] = []
        self.now = 0.0
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}
        self.at_the_end_of_a_load: list[Callable[[], object]] = []
        self.pool: ModelPool[str] = ModelPool(
            [Member(name, size) for name, size in sizes.items()],
            budget_bytes=budget,
            load=self._load,
            unload=self._unload,
            idle_unload_s=60.0,
            clock=lambda: self.now,
        )

    async def _load(self, member: Member[str]) -> str:
        if member.id in self.gates:
            await self.gates[member.id].wait()
        if member.id in self.errors:
            raise self.errors[member.id]
        assert self.pool.used_bytes <= self.pool.budget_bytes
        self.log.append(f"+{member.id}")
        for callback in self.at_the_end_of_a_load:
            asyncio.get_running_loop().call_soon(callback)
        return member.id.upper()

    async def _unload(self, member: Member[str], loaded: str) -> None:
        assert loaded == member.id.upper() and not member.num_active
        self.log.append(f"-{member.id}")

    async def touch(self, name: str) -> None:
        self.now += 1
        async with self.pool.use(name) as loaded:
            assert loaded == name.upper()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_model_is_loaded_once_for_all_who_ask_and_stays() -> None:
    world = World(100, a=10)
    await asyncio.gather(*(world.touch("a") for _ in range(5)))
    await world.touch("a")
    assert world.log == ["+a"]


async def test_the_least_recently_used_idle_model_makes_room() -> None:
    world = World(100, a=40, b=40, c=40)
    for name in "abac":
        await world.touch(name)
    assert world.log == ["+a", "+b", "-b", "+c"]


async def test_a_busy_model_is_not_unloaded_while_an_idle_one_can_go() -> None:
    world = World(100, a=40, b=40, c=40)
    async with world.pool.use("a"):
        await world.touch("b")
        await world.touch("c")
    assert world.log == ["+a", "+b", "-b", "+c"]


async def test_pinned_models_stay() -> None:
    world = World(100, a=40, b=40, c=40)
    world.pool.members["a"].is_pinned = True
    for name in "abc":
        await world.touch(name)
    world.now += 1000
    assert await world.pool.unload_idle() == ["c"]
    assert world.log == ["+a", "+b", "-b", "+c", "-c"]


async def test_a_request_waits_until_what_runs_has_finished_and_is_not_overtaken() -> None:
    world = World(100, a=60, b=60)
    async with AsyncExitStack() as running:
        await running.enter_async_context(world.pool.use("a"))
        wants_b = asyncio.create_task(world.touch("b"))
        await settle()
        wants_a = asyncio.create_task(world.touch("a"))  # would keep a busy for ever if it were let in
        await settle()
        assert not wants_b.done() and not wants_a.done() and world.log == ["+a"]
    await asyncio.gather(wants_a, wants_b)
    assert world.log == ["+a", "-a", "+b", "-b", "+a"]


async def test_two_models_that_exclude_each_other_take_turns_and_everybody_is_served() -> None:
    world = World(100, a=60, b=60)
    await asyncio.gather(*(world.touch("ab"[i % 2]) for i in range(40)))
    assert world.log.count("+a") + world.log.count("+b") <= 4, world.log


async def test_what_can_never_fit_is_refused_at_once_with_the_numbers() -> None:
    world = World(100 << 30, big=120 << 30, a=40 << 30, b=70 << 30)
    with pytest.raises(ModelLoadError, match=r"big needs 120.00 GiB .* 100.00 GiB"):
        await world.touch("big")
    world.pool.members["a"].is_pinned = True
    with pytest.raises(ModelLoadError, match=r"b needs 70.00 GiB .* 40.00 GiB of pinned"):
        await world.touch("b")
    assert world.log == []


async def test_a_failed_load_is_told_to_all_who_wait_and_tried_again_by_the_next() -> None:
    world = World(100, a=10)
    world.errors["a"] = ModelLoadError("a is broken; mend it.")
    answers = await asyncio.gather(*(world.touch("a") for _ in range(3)), return_exceptions=True)
    assert [str(answer) for answer in answers] == ["a is broken; mend it."] * 3
    assert world.pool.members["a"].state is ModelState.FAILED and world.pool.used_bytes == 0
    world.errors.clear()
    await world.touch("a")
    assert world.log == ["+a"] and world.pool.members["a"].failure is None


async def test_foreign_errors_become_one_sentence() -> None:
    world = World(100, a=10)
    world.errors["a"] = KeyError("layers.0")
    with pytest.raises(ModelLoadError, match="a could not be loaded: KeyError: 'layers.0'"):
        await world.touch("a")


async def test_a_client_that_leaves_ends_neither_the_load_nor_anothers_wait() -> None:
    world = World(100, a=10)
    world.gates["a"] = asyncio.Event()
    leaves, stays = asyncio.create_task(world.touch("a")), asyncio.create_task(world.touch("a"))
    await settle()
    leaves.cancel()
    await settle()
    world.gates["a"].set()
    await stays
    member = world.pool.members["a"]
    assert leaves.cancelled() and member.num_active == 0 and member.idle.is_set() and not member.waiting


async def test_a_client_that_leaves_in_the_moment_it_is_admitted_holds_nothing() -> None:
    world = World(100, a=10)
    world.gates["a"] = asyncio.Event()
    leaves = asyncio.create_task(world.touch("a"))
    await settle()
    world.at_the_end_of_a_load.append(leaves.cancel)  # comes after it is let in, before it knows
    world.gates["a"].set()
    await settle()
    member = world.pool.members["a"]
    assert leaves.cancelled() and member.num_active == 0 and member.idle.is_set()


async def test_idle_models_are_unloaded_after_their_time() -> None:
    world = World(100, a=10, b=10)
    await world.touch("a")
    world.now += 30
    await world.touch("b")
    world.now += 40
    assert await world.pool.unload_idle() == ["a"]
    async with world.pool.use("b"):
        world.now += 1000
        assert await world.pool.unload_idle() == []
    assert world.log == ["+a", "+b", "-a"]


async def test_an_asked_for_unload_waits_for_running_requests_and_outlives_who_asked() -> None:
    world = World(100, a=10)
    async with world.pool.use("a"):
        asking = asyncio.create_task(world.pool.unload("a"))
        await settle()
        asking.cancel()
        await settle()
        assert world.log == ["+a"]
    await settle()
    assert world.log == ["+a", "-a"] and world.pool.members["a"].state is ModelState.UNLOADED
    assert not await world.pool.unload("a")
    await world.touch("a")
