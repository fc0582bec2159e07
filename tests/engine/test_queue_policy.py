"""Who is next, and who gives way: told in requests, without an engine; then with one."""

from __future__ import annotations

from tests.engine.fake_engine import FakeEngine
from tests.simulation.fake_model import BYTES_PER_TOKEN
from vllm_mlx.engine.queue_policy import FairPolicy, QueueClock
from vllm_mlx.engine.request import BACKGROUND, Prompt, Request
from vllm_mlx.engine.sequence import Sequence


def sequence(name: str, order: int, *, length: int = 10, arrived: float = 0.0, **request: object) -> Sequence:
    return Sequence(Request(name, Prompt(tuple(range(length))), 5, **request), order, arrived)  # type: ignore[arg-type]


def names(policy: FairPolicy, waiting: list[Sequence], now: float = 1.0) -> list[str]:
    return [s.id for s in policy.order(waiting, now, lambda s: len(s.tokens))]


def test_interactive_before_background_then_the_shorter_then_the_older() -> None:
    waiting = [
        sequence("background", 0, length=2, priority=BACKGROUND),
        sequence("long", 1, length=90),
        sequence("short", 2, length=10),
        sequence("short too", 3, length=10),
    ]
    assert names(FairPolicy(), waiting) == ["short", "short too", "long", "background"]


def test_who_has_waited_for_long_is_neither_background_nor_long_any_more() -> None:
    waiting = [
        sequence("new", 9, length=5, arrived=99.0),
        sequence("old and long", 1, length=900, arrived=2.0),
        sequence("old background", 2, length=50, priority=BACKGROUND),
    ]
    assert names(FairPolicy(ageing_s=20), waiting, now=100.0) == ["old and long", "old background", "new"]


def test_a_caller_that_was_served_much_waits_for_one_that_was_not_and_is_forgiven() -> None:
    policy = FairPolicy(fade_s=60)
    greedy, modest = sequence("greedy", 0, length=5, client="a"), sequence("modest", 1, length=50, client="b")
    policy.served(greedy, 100_000, now=0.0)
    assert names(policy, [greedy, modest]) == ["modest", "greedy"]
    later = sequence("greedy later", 2, length=5, client="a", arrived=600.0)
    other = sequence("modest", 3, length=50, client="b", arrived=600.0)
    assert names(policy, [other, later], 601.0) == ["greedy later", "modest"]


def test_the_wait_is_predicted_from_how_often_somebody_leaves_the_queue() -> None:
    clock = QueueClock()
    assert clock.predicted_wait_s(0) is None
    for now in (10.0, 12.0, 14.0):
        clock.admitted(now, is_queue_empty=False)
    assert clock.predicted_wait_s(0) == 2.0 and clock.predicted_wait_s(4) == 10.0
    clock.admitted(16.0, is_queue_empty=True)
    clock.admitted(1000.0, is_queue_empty=False)
    assert clock.predicted_wait_s(0) == 2.0, "a pause without a queue says nothing"


def test_an_interactive_request_displaces_a_background_one_when_all_rows_are_taken() -> None:
    world = FakeEngine(max_rows=1)
    world.ask("background", range(10), 40, priority=BACKGROUND)
    world.step(5)
    world.ask("interactive", range(50, 60), 3)
    world.run()
    ends = {name: world.published[name].finals[0].timings.finished for name in ("background", "interactive")}
    assert ends["interactive"] < ends["background"]
    assert all(world.published[name].tokens == world.lone(name) for name in ends)


def test_a_background_request_that_has_waited_for_long_is_not_displaced_again() -> None:
    """It would be admitted before the one it made room for, and be displaced for it once more."""
    policy = FairPolicy(ageing_s=20)
    victim, candidate = sequence("background", 0, priority=BACKGROUND), sequence("interactive", 1, arrived=5.0)
    assert policy.displaces(candidate, victim, now=10.0) and not policy.displaces(candidate, victim, now=30.0)


def test_equals_do_not_displace_each_other() -> None:
    world = FakeEngine(max_rows=1)
    world.ask("first", range(10), 20)
    world.step(5)
    world.ask("second", range(50, 60), 3)
    world.run()
    assert world.scheduler.counters.num_preemptions == 0


def test_nobody_is_admitted_who_would_likely_outgrow_the_memory() -> None:
    world = FakeEngine(kv_budget_bytes=60 * BYTES_PER_TOKEN, prefix_bytes=None, expected_completion=20)
    for name in ("a", "b", "c"):
        world.ask(name, range(10), 20)
    world.step(4)
    assert len(world.scheduler.running) == 2
    world.run()
    assert world.scheduler.counters.num_preemptions == 0
    assert all(world.published[name].tokens == world.lone(name) for name in ("a", "b", "c"))
