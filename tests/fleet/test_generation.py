"""Requests to models that are not in memory: they wait, say so, and leave nothing behind. On scripted services."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.api.fakes import FakeGeneration, until
from vllm_mlx.errors import Cancelled, DeadlineExceeded, ModelLoadError, Unavailable
from vllm_mlx.fleet.generation import PooledGeneration
from vllm_mlx.fleet.pool import Member, ModelPool
from vllm_mlx.generation.events import Accepted, Finished, KeepAlive
from vllm_mlx.generation.request import GenerationRequest


@dataclass
class Loaded:
    service: FakeGeneration = field(default_factory=FakeGeneration)


class World:
    def __init__(self, *, timeout_s: float = 60.0, keep_alive_s: float = 0.001) -> None:
        self.gate = asyncio.Event()
        self.loaded = Loaded()
        self.error: Exception | None = None
        self.member: Member[Loaded] = Member("m", 1)
        self.pool = ModelPool([self.member], budget_bytes=1, load=self._load, unload=self._unload)
        self.service = PooledGeneration(self.pool, "m", timeout_s=timeout_s, keep_alive_s=keep_alive_s)

    async def _load(self, member: Member[Loaded]) -> Loaded:
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return self.loaded

    async def _unload(self, member: Member[Loaded], loaded: Loaded) -> None:
        pass

    def ask(self, **fields: Any) -> Any:
        return self.service.generate(GenerationRequest(id="r", prompt="hi", **fields))


async def test_a_request_waits_for_its_model_with_keep_alives_and_is_then_answered() -> None:
    world = World()
    events = world.ask()
    assert await anext(events) == KeepAlive("loading")
    assert world.member.num_active == 0
    world.gate.set()
    rest = [event async for event in events if not isinstance(event, KeepAlive)]
    assert isinstance(rest[0], Accepted) and isinstance(rest[-1], Finished)
    assert world.member.num_active == 0 and world.member.idle.is_set()


async def test_the_model_is_in_use_until_the_answer_is_over() -> None:
    world = World()
    world.gate.set()
    events = world.ask()
    assert isinstance(await anext(events), Accepted)
    assert world.member.num_active == 1
    await events.aclose()
    assert world.member.num_active == 0 and world.loaded.service.closed == ["r"]


async def test_a_load_that_fails_is_the_requests_error() -> None:
    world = World()
    world.error = ModelLoadError("m is broken; mend it.")
    world.gate.set()
    with pytest.raises(ModelLoadError, match="m is broken"):
        await anext(world.ask())


async def test_a_client_that_leaves_while_its_model_loads_leaves_no_wait_behind() -> None:
    world = World()
    events = world.ask()
    await anext(events)
    await events.aclose()
    world.gate.set()
    await world.pool.load("m")
    assert world.member.num_active == 0 and not world.member.waiting


async def test_a_request_can_be_cancelled_while_its_model_loads() -> None:
    world = World(keep_alive_s=60)
    asking = asyncio.create_task(anext(world.ask()))
    await until(lambda: bool(world.member.waiting))
    assert world.service.cancel("r") and not world.service.cancel("other")
    with pytest.raises(Cancelled):
        await asking


async def test_a_cancel_reaches_the_loaded_models_own_service() -> None:
    world = World()
    world.gate.set()
    events = world.ask()
    await anext(events)
    assert world.service.cancel("r") and world.loaded.service.cancelled == ["r"]
    await events.aclose()


async def test_a_request_does_not_wait_for_its_model_past_its_deadline() -> None:
    world = World(timeout_s=0.005)
    with pytest.raises(DeadlineExceeded, match="while m was loading"):
        async for event in world.ask():
            assert event == KeepAlive("loading")
    assert world.member.num_active == 0


async def test_counting_and_text_load_the_model_too() -> None:
    world = World()
    with pytest.raises(Unavailable):
        world.service.token_text(65)
    world.gate.set()
    assert await world.service.count_prompt_tokens(GenerationRequest(id="c", prompt="hi")) == 3
    assert await world.service.detokenize((104, 105)) == "hi"
    assert world.service.token_text(65) == "A"
