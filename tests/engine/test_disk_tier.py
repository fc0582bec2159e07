"""What is written, when it comes back, and what happens when the disk does not play along. A fake disk, no threads."""

from __future__ import annotations

import logging
from random import Random
from typing import Any

import pytest

from tests.engine.fake_engine import FakeEngine
from tests.simulation.fake_disk import FakeBackground, FakeCodec, FakeFolder
from tests.simulation.fake_model import BYTES_PER_TOKEN
from vllm_mlx.engine.disk_tier import DiskTier, TierOptions
from vllm_mlx.engine.prefix_cache import PrefixCache


class World(FakeEngine):
    """A fake engine whose prefix cache has a disk; `restart` gives another on the same folder."""

    def __init__(self, folder: FakeFolder | None = None, *, is_hybrid: bool = False, **options: Any) -> None:
        self.folder = folder or FakeFolder(Random(0), limit_bytes=1 << 20, fault_rate=0)
        self.writer, self.reader = FakeBackground(), FakeBackground()
        tier_options = {"min_tokens": 16, "grain": 8, "min_gain": 4, "write_bytes_per_s": 1e9}
        for name in list(options):
            if name in TierOptions.__dataclass_fields__:
                tier_options[name] = options.pop(name)
        super().__init__(is_hybrid=is_hybrid, **options)
        assert isinstance(self.cache, PrefixCache)
        self.tier = DiskTier(
            self.cache,
            self.folder,
            FakeCodec(),
            TierOptions("model", self.folder.limit_bytes, **tier_options),
            writer=self.writer,
            reader=self.reader,
            clock=lambda: self.now,
        )
        self.scheduler.disk.tier = self.tier
        self.settle()

    @property
    def numbers(self) -> Any:
        return self.tier.metrics()["disk_cache"]

    def settle(self) -> None:
        """Let the background catch up."""
        for _ in range(50):
            self.writer.run_some(100)
            self.reader.run_some(100)
            self.engine.idle()

    def restart(self, **options: Any) -> World:
        self.settle()
        self.folder.close()
        return World(self.folder, is_hybrid=self.is_hybrid, **options)

    def run(self, limit: int = 1000) -> None:
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
            self.writer.run_some(100)
            self.reader.run_some(100)
        raise AssertionError("the engine does not come to an end")


def test_a_long_prefix_is_written_at_its_first_use_and_a_short_one_at_its_second() -> None:
    world = World(min_tokens=32)
    world.ask("long", range(100, 140), 2)
    world.ask("short", range(20), 2)
    world.run()
    world.settle()
    assert sum(record.end - record.start for record, _ in world.folder.blocks.values()) == 40
    before = world.folder.num_blocks
    world.ask("again", range(20), 2)
    world.run()
    world.settle()
    assert world.folder.num_blocks > before


@pytest.mark.parametrize("is_hybrid", [False, True])
def test_a_restart_computes_only_what_is_new(is_hybrid: bool) -> None:
    world = World(is_hybrid=is_hybrid)
    world.ask("a", range(100, 160), 2)
    world.run()
    world = world.restart()
    world.ask("b", [*range(100, 160), *range(10)], 4)
    world.run()
    assert world.scheduler.counters.num_prefilled_tokens <= 10 + 4
    assert world.published["b"].tokens == world.lone("b")
    assert world.published["b"].finals[0].usage.num_cached_tokens >= 56
    assert world.numbers["num_restored_tokens"] >= 56 and world.is_clean()


def test_others_are_served_while_a_prefix_is_read() -> None:
    world = World()
    world.ask("a", range(100, 160), 2)
    world.run()
    world = world.restart()
    world.ask("b", range(100, 170), 2)
    world.ask("c", range(10), 3)
    world.step(6)
    assert world.published["c"].reason is not None and "b" in world.scheduler.waiting
    world.run()
    assert world.published["b"].tokens == world.lone("b")


def test_a_damaged_block_is_passed_over_and_the_prompt_is_computed(caplog: pytest.LogCaptureFixture) -> None:
    world = World()
    world.ask("a", range(100, 160), 2)
    world.run()
    world = world.restart()
    world.folder.fault_rate = 1.0
    with caplog.at_level(logging.WARNING):
        world.ask("b", range(100, 170), 2)
        world.run()
    assert world.published["b"].tokens == world.lone("b")
    assert world.numbers["num_damaged"] >= 1 and "passed over" in caplog.text


def test_a_faulty_folder_is_said_once_shown_and_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        world = World(FakeFolder(Random(0), limit_bytes=1 << 20, fault_rate=1.0))
        for number in range(3):
            world.ask(f"r{number}", range(100 * number, 100 * number + 40), 2)
            world.run()
            world.settle()
        assert world.engine.status().extra == {}
        assert world.numbers["fault"] == "injected"
        assert [r.levelname for r in caplog.records] == ["WARNING"]
        world.folder.fault_rate = 0
        world.now += 61
        world.settle()
    assert world.numbers["fault"] is None
    assert [r.levelname for r in caplog.records] == ["WARNING", "INFO"]
    world.ask("r9", range(50, 90), 2)
    world.run()
    world.settle()
    assert world.folder.num_blocks > 0


def test_blocks_that_were_evicted_from_the_disk_are_computed_again() -> None:
    world = World()
    world.ask("a", range(100, 160), 2)
    world.run()
    world = world.restart()
    world.folder.blocks.clear()
    world.ask("b", range(100, 160), 2)
    world.run()
    assert world.published["b"].tokens == world.lone("b")


def test_namespaces_do_not_meet_on_disk() -> None:
    world = World()
    world.ask("a", range(100, 160), 2, namespace="alice")
    world.run()
    world = world.restart()
    world.ask("b", range(100, 160), 2, namespace="bob")
    world.run()
    assert world.numbers["num_restores"] == 0
    assert world.published["b"].finals[0].usage.num_cached_tokens == 0


def test_closing_writes_what_was_only_in_memory() -> None:
    world = World(min_tokens=1000)
    world.ask("a", range(100, 160), 2)
    world.run()
    assert world.folder.num_blocks == 0
    world.tier.stop()
    assert world.tier.join(5.0)
    world = World(world.folder)
    world.ask("b", range(100, 160), 2)
    world.run()
    assert world.published["b"].finals[0].usage.num_cached_tokens >= 56


@pytest.mark.parametrize(("seconds_per_token", "swaps"), [(10.0, True), (1e-9, False)])
def test_a_preempted_row_is_swapped_to_disk_where_that_is_cheaper_than_computing_it_again(
    seconds_per_token: float, swaps: bool
) -> None:
    from vllm_mlx.engine.scheduler import FixedChunk

    world = World(
        kv_budget_bytes=60 * BYTES_PER_TOKEN,
        prefix_bytes=30 * BYTES_PER_TOKEN,
        expected_completion=1,
        min_tokens=1000,
    )
    world.scheduler._chunk_sizer = FixedChunk(16, seconds_per_token)
    world.ask("old", range(16), 30)
    world.ask("young", range(50, 66), 30)
    world.run()
    assert world.scheduler.counters.num_preemptions > 0
    assert (world.numbers["num_swaps"] > 0) is swaps
    assert all(world.published[name].tokens == world.lone(name) for name in ("old", "young"))
    assert world.is_clean()


def test_a_prompt_that_leaves_a_run_half_way_uses_its_beginning() -> None:
    world = World(grain=64)
    world.ask("a", range(100, 160), 2)
    world.run()
    world = world.restart()
    world.ask("b", [*range(100, 142), *range(30)], 4)
    world.run()
    assert world.published["b"].finals[0].usage.num_cached_tokens == 40
    assert world.published["b"].tokens == world.lone("b") and world.is_clean()
