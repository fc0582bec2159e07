"""Slices between steps: one at a time, in turns, sized by what earlier ones took; bounds in number and in time."""

from __future__ import annotations

import asyncio

import pytest

from tests.api.fake_beside import LetterEncoder, make_oneshots
from vllm_mlx.errors import DeadlineExceeded, Unavailable
from vllm_mlx.generation.encoding import EncodingService
from vllm_mlx.generation.oneshot import Pace


def test_a_slice_grows_and_shrinks_with_what_a_unit_costs():
    pace = Pace(target_s=0.1, first_units=64)
    assert pace.take([8] * 100) == 8
    pace.observe(64, 0.0064)
    assert pace.units == 1000 and pace.take([8] * 200) == 125
    for _ in range(30):
        pace.observe(100, 1.0)
    assert pace.units == 10 and pace.take([8] * 100) == 1


def test_the_width_of_a_slice_is_its_longest_row():
    pace = Pace(target_s=1, first_units=20)
    assert pace.take([2, 2, 2, 10]) == 3
    assert pace.take([500]) == 1


class ManualEngine:
    """Jobs wait until the test runs one, as they wait for a step to end."""

    def __init__(self) -> None:
        self.waiting: list[asyncio.Future] = []

    async def call(self, job):
        gate = asyncio.get_running_loop().create_future()
        self.waiting.append(gate)
        await gate
        return job()

    async def run_one(self) -> None:
        while not self.waiting:
            await asyncio.sleep(0)
        self.waiting.pop(0).set_result(None)


async def test_at_most_one_slice_waits_for_the_device_and_jobs_take_turns():
    engine = ManualEngine()
    oneshots = make_oneshots(engine)
    order: list[str] = []

    async def job(name: str, num_slices: int) -> None:
        for _ in range(num_slices):
            await oneshots.slice(lambda: order.append(name))

    jobs = asyncio.gather(job("a", 3), job("b", 3))
    for _ in range(6):
        await asyncio.sleep(0)
        assert len(engine.waiting) <= 1
        await engine.run_one()
    await jobs
    assert order == ["a", "b"] * 3


async def test_a_large_job_is_many_slices_with_results_in_order():
    oneshots = make_oneshots()
    encoder = LetterEncoder()
    service = EncodingService(oneshots, encoder)
    service.pace = Pace(target_s=1e-9, seconds_per_unit=1.0)  # nothing fits: one row a slice
    texts = ["abc", "a", "ab" * 9]
    many = await service.embed(texts)
    assert encoder.batches == [1, 1, 1]
    for text, vector in zip(texts, many.values, strict=True):
        assert (vector == (await service.embed([text])).values[0]).all()


async def test_a_request_beyond_its_time_ends_with_a_deadline():
    oneshots = make_oneshots(ManualEngine(), timeout_s=0.001)
    with pytest.raises(DeadlineExceeded):
        async with oneshots.admitted():
            await oneshots.slice(lambda: None)


async def test_a_draining_server_admits_nothing():
    oneshots = make_oneshots()
    oneshots.start_drain()
    with pytest.raises(Unavailable):
        async with oneshots.admitted():
            pass
