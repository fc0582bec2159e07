"""The engine's turn: one final event for everybody, cancellation from any state, deadlines, failed steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.engine.fake_engine import FakeEngine
from vllm_mlx.engine.step import FinishReason


def failing(*numbers: int, at: str = "launch") -> Callable[[str], None]:
    """A fault at the given launches (or collects), counted from 1."""
    count = [0]

    def fault(where: str) -> None:
        if where == at:
            count[0] += 1
            if count[0] in numbers:
                raise RuntimeError(f"the device is gone ({at} {count[0]})")

    return fault


def test_tokens_are_published_as_they_come_and_the_last_event_has_the_reason() -> None:
    world = FakeEngine()
    world.ask("r", range(10), 5)
    world.run()
    events = world.published["r"].events
    assert [len(e.token_ids) for e in events] == [1] * 5
    assert [e.finish_reason for e in events] == [None] * 4 + [FinishReason.LENGTH]
    assert world.published["r"].tokens == world.lone("r")
    final = events[-1]
    assert final.usage.num_completion_tokens == 5 and final.timings.finished >= final.timings.first_token


def test_the_next_step_is_launched_before_the_last_ones_tokens_are_handled() -> None:
    order: list[str] = []
    world = FakeEngine(fault=order.append)
    world.ask("r", range(3), 4)
    world.run()
    assert order == ["launch", "launch", "collect", "launch", "collect", "launch", "collect", "launch", "collect",
                     "collect"]  # fmt: skip


def test_a_row_that_needs_its_token_on_the_host_is_finished_first() -> None:
    order: list[str] = []
    world = FakeEngine(fault=order.append)
    world.runner._needs_host = lambda request: True
    world.ask("r", [3], 3)
    world.run()
    assert order == ["launch", "collect"] * 3
    assert world.published["r"].tokens == world.lone("r")


@pytest.mark.parametrize("num_steps", [0, 1, 3, 8], ids=["waiting", "admitted", "in prefill", "in decode"])
def test_cancel_ends_a_request_within_one_step_from_any_state(num_steps: int) -> None:
    world = FakeEngine(chunk=8)
    world.ask("other", range(100, 110), 30)
    world.ask("r", range(30), 30)
    world.step(num_steps)
    world.engine.cancel("r")
    world.step()
    assert world.published["r"].reason is FinishReason.CANCELLED and len(world.published["r"].finals) == 1
    assert "r" not in world.runner.rows
    world.run()
    assert world.published["other"].tokens == world.lone("other")
    assert world.published["r"].tokens == world.lone("r")[: len(world.published["r"].tokens)]
    assert world.is_clean()


def test_cancelling_a_preempted_request_ends_it() -> None:
    world = FakeEngine()
    world.ask("r", range(30), 30)
    world.step(4)
    world.scheduler.preempt(world.scheduler.find("r"))
    world.engine.cancel("r")
    world.run()
    assert world.published["r"].reason is FinishReason.CANCELLED and world.is_clean()


def test_cancelling_twice_or_too_late_or_the_unknown_does_nothing() -> None:
    world = FakeEngine()
    world.ask("r", range(10), 2)
    world.engine.cancel("nobody")
    world.run()
    world.engine.cancel("r")
    world.engine.cancel("r")
    world.run()
    assert [e.finish_reason for e in world.published["r"].finals] == [FinishReason.LENGTH]
    assert set(world.published) == {"r"}


def test_a_deadline_ends_waiting_and_running_requests() -> None:
    world = FakeEngine(max_rows=1)
    world.ask("running", range(10), 100, deadline=6.0)
    world.ask("waiting", range(10), 100, deadline=4.0)
    world.run()
    for name in ("running", "waiting"):
        assert world.published[name].reason is FinishReason.DEADLINE and len(world.published[name].finals) == 1
    assert world.published["waiting"].tokens == [] and world.published["running"].tokens
    assert world.now < 8 and world.is_clean()


def test_an_id_that_is_running_is_refused_and_the_first_goes_on() -> None:
    world = FakeEngine()
    world.ask("r", range(10), 6)
    world.step(2)
    first = world.requests["r"]
    world.ask("r", range(50, 60), 6)
    assert "running" in world.published["r"].finals[0].detail
    world.published["r"].events = [e for e in world.published["r"].events if e.finish_reason is None]
    world.requests["r"] = first
    world.run()
    assert world.published["r"].tokens == world.lone("r")


# ── failures ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("at", ["launch", "collect"])
def test_a_failed_step_ends_its_own_sequences_and_the_others_are_recomputed(at: str) -> None:
    world = FakeEngine(max_rows=2, fault=failing(3, at=at))
    for name, start in (("a", 0), ("b", 50), ("c", 90)):
        world.ask(name, range(start, start + 8), 6)
    world.run()
    reasons = {name: world.published[name].reason for name in "abc"}
    assert reasons["a"] is FinishReason.ERROR and "the device is gone" in world.published["a"].finals[0].detail
    assert reasons["c"] is FinishReason.LENGTH and world.published["c"].tokens == world.lone("c")
    assert world.statuses[-1].is_healthy and world.statuses[-1].num_failed_steps == 1 and world.is_clean()
    assert all(len(world.published[name].finals) == 1 for name in "abc")


def test_two_failed_steps_without_progress_make_the_engine_unhealthy_and_answer_everybody() -> None:
    world = FakeEngine(max_rows=1, fault=failing(*range(2, 100)))
    for name in "abc":
        world.ask(name, range(8), 6)
    world.run()
    assert not world.statuses[-1].is_healthy and "the device is gone" in world.statuses[-1].failure
    assert all(world.published[name].reason is FinishReason.ERROR for name in "abc")
    assert all(len(world.published[name].finals) == 1 for name in "abc") and world.is_clean()


def test_an_unhealthy_engine_answers_at_once_and_computes_nothing() -> None:
    world = FakeEngine(max_rows=1, fault=failing(*range(1, 100)))
    world.ask("a", range(8), 6)
    world.ask("b", range(8), 6)
    world.run()
    steps = world.statuses[-1].num_steps
    world.ask("late", range(8), 6)
    assert world.published["late"].reason is FinishReason.ERROR
    assert "the device is gone" in world.published["late"].finals[0].detail
    assert not world.engine.has_work and world.statuses[-1].num_steps == steps


def test_failures_with_progress_between_them_are_forgiven() -> None:
    world = FakeEngine(max_rows=1, fault=failing(4, 9, 14))
    for name in "abcdef":
        world.ask(name, range(8), 3)
    world.run()
    assert world.statuses[-1].is_healthy and world.statuses[-1].num_failed_steps == 3
    good = [n for n in "abcdef" if world.published[n].reason is FinishReason.LENGTH]
    assert len(good) == 3 and all(world.published[n].tokens == world.lone(n) for n in good)


def test_cancel_all_ends_everything_and_publishes_it() -> None:
    world = FakeEngine(max_rows=1)
    world.ask("running", range(8), 30)
    world.ask("waiting", range(8), 30)
    world.step(4)
    world.engine.cancel_all()
    assert {world.published[n].reason for n in ("running", "waiting")} == {FinishReason.CANCELLED}
    assert not world.scheduler.running and not world.scheduler.waiting


# ── what others see ─────────────────────────────────────────────────────────────────────────────────────────────


def test_the_status_shows_every_request_where_it_stands() -> None:
    world = FakeEngine(max_rows=2, chunk=8, max_tokens_per_step=9)
    world.ask("decoding", range(4), 30)
    world.step(3)
    world.ask("prefilling", range(100, 140), 5)
    world.ask("waiting", range(200, 250), 5)
    world.step(2)
    progress = {p.request_id: p for p in world.statuses[-1].requests}
    assert [progress[n].phase for n in ("decoding", "prefilling", "waiting")] == ["decode", "prefill", "waiting"]
    assert 0 < progress["prefilling"].num_computed_tokens < 40 and progress["waiting"].queue_position == 0
    status = world.statuses[-1]
    assert (status.num_running, status.num_waiting) == (2, 1) and status.kv_bytes == world.scheduler.kv_bytes > 0


def test_those_who_asked_are_told_of_plans_steps_ends_and_idle_moments() -> None:
    world = FakeEngine()
    told: list[str] = []
    world.engine.before_plan.append(lambda now: told.append("plan"))
    world.engine.on_step.append(lambda plan, elapsed: told.append("step"))
    world.engine.on_finished.append(lambda sequence: told.append(f"{sequence.id} ended"))
    world.engine.on_idle.append(lambda: told.append("idle") is not None)
    world.ask("r", [3], 1)
    world.run()
    assert not world.engine.idle()
    assert told[0] == "plan" and "step" in told and told[-2:] == ["r ended", "idle"]


def test_reports_of_others_are_part_of_the_status() -> None:
    world = FakeEngine()
    world.engine.reports.append(lambda: {"guard": "calm"})
    assert world.engine.status().extra["guard"] == "calm"


def test_a_step_that_shared_its_time_with_a_job_teaches_nothing() -> None:
    world = FakeEngine()
    seen: list[float] = []
    world.engine.on_step.append(lambda plan, elapsed_s: seen.append(elapsed_s))
    world.ask("r", range(3), 6)
    world.run()
    num_steps = len(seen)
    world.ask("s", range(3), 6)
    world.engine.step()
    world.engine.paused(5.0)
    world.run()
    assert len(seen) == 2 * num_steps - 1
