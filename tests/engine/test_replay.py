"""Replays of greedy requests in idle moments, and the row limit they and the guards lead to, on the fake engine."""

from __future__ import annotations

from tests.engine.fake_engine import FakeEngine
from vllm_mlx.engine.replay import Replayer, watch_rows
from vllm_mlx.engine.request import MediaSpan, Prompt, SamplingParams
from vllm_mlx.engine.step import FinishReason
from vllm_mlx.guards.divergence import DivergenceGuard, Verdict
from vllm_mlx.guards.rows import RowGuard


class Guarded(FakeEngine):
    def __init__(self, *, mode: str = "batched", action: str = "serialize", interval_s: float = 0.0, **options) -> None:
        super().__init__(**options)
        self.guard = DivergenceGuard(action=action, num_good_to_recover=2)
        self.rows = RowGuard(mode, 8, quiet_s=50)
        self.replayer = Replayer(self.engine, self.guard, interval_s=interval_s)
        watch_rows(self.engine, self.rows, self.replayer)

    def ask_two(self, number: int = 0, **more) -> None:
        """Two requests computed side by side."""
        self.ask(f"a{number}", range(20), 12, **more)
        self.ask(f"b{number}", range(30, 50), 12, **more)
        self.run()

    def probe(self) -> bool:
        """An idle moment, and what it leads to."""
        began = self.engine.idle()
        self.run()
        return began


def test_a_batched_greedy_request_is_replayed_alone_and_agrees() -> None:
    world = Guarded()
    world.ask_two()
    assert world.published["a0"].finals[0].max_batch_rows == 2
    assert world.probe()
    assert world.guard.verdict is Verdict.PASS and world.guard.agreement == 1.0
    assert world.is_clean()


def test_nothing_is_replayed_that_ran_alone_or_was_not_greedy() -> None:
    world = Guarded()
    world.ask("alone", range(20), 12)
    world.run()
    world.ask_two(sampling=SamplingParams(temperature=0.5, seed=1))
    assert not world.probe()


def test_a_replay_touches_nothing_in_the_prefix_cache() -> None:
    world = Guarded(prefix_bytes=100_000)
    world.ask_two()
    before = (world.cache.nbytes, world.cache.counters.num_hits, world.cache.counters.num_misses)
    assert world.probe()
    assert (world.cache.nbytes, world.cache.counters.num_hits, world.cache.counters.num_misses) == before


def test_probes_keep_their_distance() -> None:
    world = Guarded(interval_s=100)
    world.ask_two()
    assert world.probe() and not world.probe()
    world.now += 100
    assert world.probe()


def test_a_probe_gives_way_to_a_client_and_says_nothing() -> None:
    world = Guarded()
    world.ask_two()
    assert world.engine.idle()
    world.step(2)
    world.ask("client", range(60, 70), 4)
    world.step()
    assert set(world.scheduler.running) == {"client"}
    world.run()
    assert world.published["client"].tokens == world.lone("client")
    assert world.published["client"].finals[0].max_batch_rows == 1
    assert world.guard.verdict is Verdict.UNKNOWN and world.guard.num_interrupted == 1
    assert world.probe() and world.guard.verdict is Verdict.PASS  # the sample was kept for the next idle moment


def test_divergence_is_found_with_the_position_of_the_first_difference() -> None:
    world = Guarded(action="warn")
    world.runner.wobbles = True
    world.ask_two()
    assert world.published["a0"].tokens != world.lone("a0")
    world.probe()
    report = world.guard.report()
    assert world.guard.verdict is Verdict.WARNING and report["last_first_difference"] == 2
    assert world.limits.max_rows == 8  # warned, no more


def test_serialize_holds_clients_to_one_row_until_batched_replays_agree() -> None:
    world = Guarded()
    world.runner.wobbles = True
    world.ask_two()
    world.probe()
    assert world.guard.serializes
    world.ask_two(1)
    assert world.published["b1"].tokens == world.lone("b1")
    assert world.published["b1"].finals[0].max_batch_rows == 1
    assert world.probe() and world.guard.serializes  # lone answers, replayed in a batch: still wrong
    world.runner.wobbles = False
    for number in range(2, 5):
        if world.guard.serializes:
            world.ask_two(number)
            assert world.probe()
    assert world.guard.verdict is Verdict.PASS and not world.guard.serializes
    world.ask_two(9)
    assert world.published["b9"].finals[0].max_batch_rows == 2


def test_while_serialized_the_failing_request_itself_is_asked_again() -> None:
    world = Guarded()
    world.runner.wobbles = True
    world.ask_two()
    world.probe()
    world.runner.wobbles = False
    assert world.probe()  # with no further traffic
    assert world.guard.report()["good_probes_in_a_row"] == 1


def test_a_failed_probe_is_unknown_and_not_divergence() -> None:
    fails = [False]

    def fault(where: str) -> None:
        if fails[0]:
            raise RuntimeError("no device")

    world = Guarded(fault=fault)
    world.ask_two()
    fails[0] = True
    assert world.engine.idle()
    world.step()
    fails[0] = False
    world.run()
    assert world.guard.verdict is Verdict.UNKNOWN and not world.guard.serializes
    assert world.guard.num_failed == 1 and "no device" in world.guard.last_failure
    world.ask("after")
    world.run()
    assert world.published["after"].reason is FinishReason.LENGTH


def test_an_image_is_replayed_with_its_prompt() -> None:
    world = Guarded()
    span = MediaSpan(2, 4, "image", b"12345678", {})
    world.ask("image", Prompt(tuple(range(20)), (span,)), 8)
    world.ask("text", range(30, 50), 10)
    world.run()
    world.probe()
    world.probe()
    reports = world.guard.report()
    assert world.guard.verdict is Verdict.PASS and reports["sample_count"] == 2 and reports["last_had_media"] is True


def test_a_request_ended_by_its_client_is_replayed_as_far_as_it_came() -> None:
    world = Guarded()
    world.ask("left", range(20), 30)
    world.ask("other", range(30, 50), 30)
    world.step(8)
    world.engine.cancel("left")
    world.engine.cancel("other")
    world.run()
    assert world.probe() and world.guard.agreement == 1.0
    assert 0 < world.guard._recent[-1].num_tokens < 30


def test_auto_computes_one_row_until_two_requests_meet_then_all() -> None:
    world = Guarded(mode="auto")
    world.ask("a", range(20), 30)
    world.step(4)
    assert world.limits.max_rows == 1
    world.ask("b", range(30, 50), 30)
    world.step(4)
    assert len(world.scheduler.running) == 2
    world.run()
    assert world.published["b"].finals[0].max_batch_rows == 2
    world.now += 51
    world.ask("c", range(5))
    world.step()
    assert world.limits.max_rows == 1 and world.statuses[-1].extra["rows"]["times_widened"] == 1


def test_simple_computes_requests_one_after_the_other() -> None:
    world = Guarded(mode="simple")
    for name in "abc":
        world.ask(name, range(10), 5)
    most = 0
    while world.engine.has_work:
        world.step()
        most = max(most, len(world.scheduler.running))
    assert most == 1 and all(world.published[n].tokens == world.lone(n) for n in "abc")


def test_probes_do_not_count_as_concurrency() -> None:
    world = Guarded(mode="auto")
    world.ask_two()
    peak = world.rows.peak
    world.probe()
    assert world.rows.peak == peak == 2


def test_the_status_carries_both_reports() -> None:
    world = Guarded()
    world.ask_two()
    extra = world.statuses[-1].extra
    assert extra["batch_divergence"]["status"] == "unknown" and extra["batch_divergence"]["samples_kept"] == 2
    assert extra["rows"]["row_limit"] == 8
