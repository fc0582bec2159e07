"""Decisions of the scheduler, step by step, on the hashing fake model: what is planned, admitted, preempted, kept."""

from __future__ import annotations

import pytest

from tests.engine.fake_engine import BLOCK, FakeEngine
from tests.simulation.fake_model import BYTES_PER_TOKEN
from vllm_mlx.engine.request import MediaSpan, Prompt, SamplingParams
from vllm_mlx.engine.step import FinishReason, StepPlan


def plans_of(world: FakeEngine) -> list[StepPlan]:
    """Every plan that is launched from now on."""
    plans: list[StepPlan] = []
    launch = world.runner.launch

    def record(plan, sequences):
        plans.append(plan)
        return launch(plan, sequences)

    world.runner.launch = record
    return plans


# ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_decode_goes_first_and_prefill_takes_what_is_left_of_the_budget() -> None:
    world = FakeEngine(max_tokens_per_step=12, chunk=64)
    world.ask("old", range(5), 50)
    world.step(3)
    plans = plans_of(world)
    world.ask("new", range(100, 140), 5)
    world.step(3)
    assert all(plan.decode[0] == "old" and plan.num_tokens <= 12 for plan in plans)
    assert [(c.start, c.end) for plan in plans for c in plan.chunks] == [(0, 8), (8, 16), (16, 24)]


def test_chunks_end_on_the_grid_of_blocks_until_the_last() -> None:
    world = FakeEngine(chunk=10)
    plans = plans_of(world)
    world.ask("r", range(30), 1)
    world.run()
    chunks = [c for plan in plans for c in plan.chunks]
    assert [c.end % BLOCK for c in chunks[:-1]] == [0] * (len(chunks) - 1)
    assert chunks[-1].end == 29 and chunks[-1].is_last  # the prompt's last token is the first decode step's


def test_every_token_is_computed_exactly_once() -> None:
    world = FakeEngine(chunk=8)
    world.ask("r", range(30), 7)
    world.run()
    assert world.runner.num_computed == 30 + 6  # the last completion token is never computed


def test_a_prompt_of_one_token_needs_no_chunk() -> None:
    world = FakeEngine()
    plans = plans_of(world)
    world.ask("r", [3], 4)
    world.run()
    assert not any(plan.chunks for plan in plans) and world.published["r"].tokens == world.lone("r")


def test_older_requests_are_prefilled_before_younger_ones() -> None:
    world = FakeEngine(chunk=8, max_tokens_per_step=12)
    plans = plans_of(world)
    for name, start in (("a", 0), ("b", 100)):
        world.ask(name, range(start, start + 24), 1)
    world.step(2)
    assert [c.request_id for plan in plans for c in plan.chunks][:2] == ["a", "a"]


def test_a_lower_priority_number_is_admitted_first() -> None:
    world = FakeEngine(max_rows=1)
    world.ask("running", range(5), 3)
    world.step()
    world.ask("later", range(5), 3, priority=1)
    world.ask("sooner", range(5), 3, priority=0)
    world.run()
    finals = {name: world.published[name].finals[0].timings for name in ("later", "sooner")}
    assert finals["sooner"].admitted < finals["later"].admitted


def test_the_row_limit_holds_back_and_never_ends() -> None:
    world = FakeEngine(max_rows=4)
    for number in range(4):
        world.ask(f"r{number}", range(number * 10, number * 10 + 8), 20)
    world.step(3)
    world.limits.max_rows = 1
    world.ask("late", range(90, 98), 2)
    world.step(2)
    assert len(world.scheduler.running) == 4 and "late" in world.scheduler.waiting
    world.run()
    assert all(world.published[name].tokens == world.lone(name) for name in world.requests)


def test_a_media_span_that_must_stay_whole_is_never_cut() -> None:
    world = FakeEngine(chunk=8, max_tokens_per_step=64, atomic_spans=True)
    plans = plans_of(world)
    span = MediaSpan(6, 9, "image", b"12345678", {})
    world.ask("r", Prompt(tuple([1] * 6 + [0] * 9 + [2] * 9), (span,)), 2)
    world.run()
    ends = [c.end for plan in plans for c in plan.chunks]
    assert not any(span.start < end < span.end for end in ends)
    assert world.published["r"].tokens == world.lone("r")


# ── ending ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_stop_token_ends_after_the_least_number_of_tokens() -> None:
    probe = FakeEngine()
    probe.ask("r", range(10), 12)
    probe.run()
    stop = probe.published["r"].tokens[2]
    world = FakeEngine()
    world.ask("early", range(10), 12, stop_token_ids=frozenset({stop}))
    world.ask("late", range(10), 12, stop_token_ids=frozenset({stop}), sampling=SamplingParams(min_tokens=3))
    world.run()
    early, late = world.published["early"], world.published["late"]
    assert early.reason is FinishReason.STOP and len(early.tokens) == 3 and early.finals[0].stop_token_id == stop
    assert len(late.tokens) > 3


def test_the_judge_ends_a_sequence_and_names_the_loop() -> None:
    world = FakeEngine(judge=lambda sequence: "a loop" if sequence.num_completion_tokens == 3 else None)
    world.ask("r", range(10), 12)
    world.run()
    assert world.published["r"].reason is FinishReason.REPETITION
    assert world.published["r"].finals[0].detail == "a loop" and len(world.published["r"].tokens) == 3


def test_usage_counts_prompt_completion_and_cached_tokens() -> None:
    world = FakeEngine()
    world.ask("first", range(20), 4)
    world.run()
    world.ask("second", range(20), 4)
    world.run()
    usage = world.published["second"].finals[0].usage
    assert (usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens) == (20, 4, 19)


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_can_never_fit_is_refused_with_numbers() -> None:
    world = FakeEngine(kv_budget_bytes=100)
    world.ask("big", range(50), 5)
    world.ask("small", range(5), 3)
    world.run()
    final = world.published["big"].finals[0]
    assert final.finish_reason is FinishReason.ERROR and "KV cache" in (final.detail or "")
    assert world.published["small"].tokens == world.lone("small")


def test_what_does_not_fit_now_waits_its_turn() -> None:
    world = FakeEngine(kv_budget_bytes=30 * BYTES_PER_TOKEN, prefix_bytes=None)
    world.ask("a", range(20), 5)
    world.ask("b", range(50, 70), 5)
    world.step(2)
    assert set(world.scheduler.running) == {"a"} and set(world.scheduler.waiting) == {"b"}
    world.run()
    assert world.published["b"].tokens == world.lone("b")


def test_idle_prefixes_are_dropped_before_anybody_waits() -> None:
    world = FakeEngine(kv_budget_bytes=50 * BYTES_PER_TOKEN)
    world.ask("a", range(40), 2)
    world.run()
    assert world.cache.nbytes == 41 * BYTES_PER_TOKEN
    world.ask("b", range(100, 140), 2)
    world.step()
    assert "b" in world.scheduler.running and world.cache.nbytes == 0


def test_the_youngest_gives_way_when_rows_outgrow_the_memory_and_gets_its_answer_all_the_same() -> None:
    world = FakeEngine(kv_budget_bytes=40 * BYTES_PER_TOKEN, prefix_bytes=None, expected_completion=1)
    world.ask("old", range(10), 20)
    world.ask("young", range(50, 60), 20)
    world.run()
    assert world.scheduler.counters.num_preemptions > 0
    assert world.published["old"].finals[0].timings.finished < world.published["young"].finals[0].timings.finished
    assert all(world.published[name].tokens == world.lone(name) for name in ("old", "young"))


@pytest.mark.parametrize("keeps_answers", [True, False])
def test_a_preempted_answer_is_computed_in_chunks_or_where_answers_are_not_kept_decoded_again(keeps_answers) -> None:
    world = FakeEngine(keeps_answers=keeps_answers, chunk=64)
    world.runner._decodes_answers = not keeps_answers
    world.ask("r", range(10), 8)
    world.ask("other", range(10, 30), 8)
    world.step(5)
    known = len(world.published["r"].tokens)
    assert known > 2
    world.scheduler.preempt(world.scheduler.running["r"])
    plans = plans_of(world)
    world.run()
    assert max(c.end for plan in plans for c in plan.chunks) == (10 + known - 1 if keeps_answers else 9)
    # Its tokens come once each, those decoded again not at all.
    again = known if not keeps_answers else 0
    assert sum("r" in plan.decode for plan in plans) == 8 - known + again
    assert all(world.published[name].tokens == world.lone(name) for name in ("r", "other"))


def test_an_answer_to_be_decoded_again_is_not_taken_from_the_prompt_of_another() -> None:
    world = FakeEngine(keeps_answers=False)
    world.runner._decodes_answers = True
    world.ask("r", range(10), 14)
    world.step(11)
    known = world.published["r"].tokens
    assert len(known) >= 2 * BLOCK
    world.ask("told", [*range(10), *known], 1)
    world.step(2)
    world.scheduler.preempt(world.scheduler.running["r"])
    world.run()
    assert world.published["r"].tokens == world.lone("r")


def test_a_sequence_alone_that_fills_the_memory_ends_with_length_and_says_why() -> None:
    world = FakeEngine(kv_budget_bytes=20 * BYTES_PER_TOKEN, prefix_bytes=None)
    world.ask("r", range(10), 50)
    world.run()
    assert world.published["r"].reason is FinishReason.LENGTH
    assert "memory" in world.published["r"].finals[0].detail and world.is_clean()
    assert world.published["r"].tokens == world.lone("r")[: len(world.published["r"].tokens)]


# ── the prefix cache ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_repeated_prompt_computes_less_than_a_block_beyond_its_end() -> None:
    world = FakeEngine()
    world.ask("first", range(40), 1)
    world.run()
    before = world.runner.num_computed
    world.ask("second", [*range(37), 90, 91, 92], 1)
    world.run()
    assert world.runner.num_computed - before <= 3 + BLOCK
    assert world.published["second"].tokens == world.lone("second")


def test_an_answer_is_kept_for_the_next_turn_of_its_conversation() -> None:
    world = FakeEngine()
    world.ask("first", range(20), 13)
    world.run()
    world.ask("second", [*range(20), *world.published["first"].tokens, 7, 7], 2)
    world.run()
    assert world.published["second"].finals[0].usage.num_cached_tokens == 32


def test_a_cancelled_request_leaves_what_it_computed() -> None:
    world = FakeEngine(chunk=8)
    world.ask("r", range(60), 5)
    world.step(3)
    world.engine.cancel("r")
    world.run()
    assert world.cache.nbytes > 0 and world.is_clean()
    world.ask("again", range(60), 5)
    world.run()
    assert world.published["again"].finals[0].usage.num_cached_tokens >= 8
    assert world.published["again"].tokens == world.lone("again")


def test_a_failed_sequence_leaves_nothing() -> None:
    fails = [False]

    def fault(where: str) -> None:
        if fails[0]:
            raise RuntimeError("injected")

    world = FakeEngine(chunk=8, fault=fault)
    world.ask("r", range(30), 5)
    world.step(1)
    fails[0] = True
    world.step(1)
    fails[0] = False
    world.run()
    assert world.published["r"].reason is FinishReason.ERROR and world.cache.nbytes == 0


def test_the_answer_after_a_hit_says_where_the_prompt_left_the_cached_path() -> None:
    world = FakeEngine()
    world.ask("first", range(20), 1)
    world.run()
    world.ask("second", [*range(10), *range(50, 60)], 1)
    world.run()
    report = world.published["second"].finals[0].cache
    assert report.num_matched_tokens == report.num_cached_tokens == 10 and "token 10" in report.miss_reason


def test_a_request_may_leave_the_cache_alone() -> None:
    world = FakeEngine()
    world.ask("first", range(20), 4)
    world.run()
    held = world.cache.nbytes
    world.ask("second", range(20), 8, skips_prefix_cache=True)
    world.run()
    assert world.cache.nbytes == held and world.published["second"].finals[0].usage.num_cached_tokens == 0
    assert world.published["second"].tokens == world.lone("second")


def test_only_requests_that_share_the_cache_wait_for_a_prefix_that_another_is_computing() -> None:
    for skips, num_running in ((False, 1), (True, 2)):
        world = FakeEngine(chunk=100, max_tokens_per_step=100)
        world.ask("first", range(40), 2, skips_prefix_cache=skips)
        world.ask("second", range(40), 2, skips_prefix_cache=skips)
        world.step()
        assert len(world.scheduler.running) == num_running
        world.run()
        assert all(world.published[name].tokens == world.lone(name) for name in ("first", "second"))


@pytest.mark.parametrize("is_hybrid", [False, True])
def test_namespaces_do_not_share(is_hybrid: bool) -> None:
    world = FakeEngine(is_hybrid=is_hybrid)
    for namespace in ("alice", "bob", "alice"):
        world.ask(f"{namespace}{len(world.requests)}", range(20), 2, namespace=namespace)
        world.run()
    cached = [world.published[name].finals[0].usage.num_cached_tokens for name in world.requests]
    assert cached[0] == cached[1] == 0 and cached[2] > 0


def test_states_that_cannot_be_cut_are_kept_at_message_ends() -> None:
    world = FakeEngine(is_hybrid=True)
    world.cache.min_checkpoint_gap = 0
    world.ask("first", Prompt(tuple(range(30)), boundaries=(13,)), 1)
    world.run()
    world.ask("second", Prompt((*range(14), *range(60, 80)), boundaries=(13,)), 1)
    world.run()
    assert world.published["second"].finals[0].usage.num_cached_tokens == 12
    assert world.published["second"].tokens == world.lone("second")
