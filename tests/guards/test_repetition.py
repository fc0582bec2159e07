"""Loops are named when the policy's signs are complete, and not a token earlier."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from vllm_mlx.guards.repetition import POLICIES, WINDOW, RepetitionJudge, find_loop


def sequence(
    completion: list[int], *, policy: str = "safe", prompt: int = 5, max_tokens: int = 100, is_shaped: bool = False
) -> SimpleNamespace:
    make_constraint = object if is_shaped else None
    request = SimpleNamespace(repetition_policy=policy, max_tokens=max_tokens, make_constraint=make_constraint)
    return SimpleNamespace(
        request=request, tokens=[7] * prompt + completion, num_completion_tokens=len(completion)
    )


def first_hit(stream: list[int], policy: str) -> tuple[int, str] | None:
    """After how many tokens the judge speaks, and what it says."""
    judge = RepetitionJudge()
    for count in range(1, len(stream) + 1):
        loop = judge(sequence(stream[:count], policy=policy))
        if loop is not None:
            return count, loop
    return None


@pytest.mark.parametrize(
    ("policy", "stream", "expected"),
    [
        ("safe", [1, 2] + [9] * 20, (10, "single_token_run")),
        ("strict", [1, 2] + [9] * 20, (6, "single_token_run")),
        ("safe", [5] + [1, 2] * 20, (13, "pattern_loop_len_2")),
        ("strict", [5] + [1, 2] * 20, (9, "pattern_loop_len_2")),
        ("safe", [5] + [1, 2, 3] * 20, (19, "pattern_loop_len_3")),
        ("safe", [5] + [1, 2, 3, 4] * 20, (25, "pattern_loop_len_4")),
        ("strict", [8] + [1, 2, 3, 4, 5, 6] * 20, (25, "pattern_loop_len_6")),
        ("safe", [8] + [1, 2, 3, 4, 5] * 20, None),
        ("strict", [8] + [1, 2, 3, 4, 5, 6, 7] * 20, None),
        ("off", [9] * 50, None),
    ],
)
def test_a_loop_is_named_at_its_last_missing_token(policy, stream, expected) -> None:
    assert first_hit(stream, policy) == expected


def test_tokens_of_the_prompt_do_not_count() -> None:
    judge = RepetitionJudge()
    assert judge(sequence([7] * 7, prompt=50)) is None
    assert judge(sequence([7] * 8, prompt=50)) == "single_token_run"


@pytest.mark.parametrize(
    ("stream", "length", "loop"), [([9] * 40, 32, "single_token_run"), ([1, 2] * 40, 48, "pattern_loop_len_2")]
)
def test_an_answer_of_a_given_shape_may_repeat_itself_four_times_as_long(stream, length, loop) -> None:
    judge = RepetitionJudge()
    assert judge(sequence(stream[: length - 1], is_shaped=True)) is None
    assert judge(sequence(stream[:length], is_shaped=True)) == loop


def test_the_quick_look_agrees_with_counting_repeats_one_by_one() -> None:
    def slow(completion: list[int], policy: str) -> str | None:
        signs, tail = POLICIES[policy], completion[-WINDOW:]
        patterns = [(1, signs.num_identical), *((n, signs.num_repeats) for n in signs.pattern_lengths)]
        for length, repeats in patterns:
            if len(tail) >= length * repeats and tail[-length * repeats :] == tail[-length:] * repeats:
                return "single_token_run" if length == 1 else f"pattern_loop_len_{length}"
        return None

    rng = random.Random(3)
    seen = set()
    for _ in range(3000):
        pattern = [rng.randrange(3) for _ in range(rng.randint(1, 8))]
        stream = [rng.randrange(3) for _ in range(rng.randint(0, 6))] + pattern * rng.randint(1, 9)
        for policy in ("safe", "strict"):
            found = find_loop([1, 1, 1, *stream], len(stream), POLICIES[policy])
            assert found == slow(stream, policy), (policy, stream)
            seen.add(found)
    assert {None, "single_token_run", "pattern_loop_len_2", "pattern_loop_len_6"} <= seen


def test_interventions_and_saved_tokens_are_counted() -> None:
    judge = RepetitionJudge()
    judge(sequence([9] * 8, max_tokens=100))
    judge(sequence([9] * 8, max_tokens=10))
    judge(sequence([1, 2] * 6, max_tokens=12))
    assert judge.report() == {
        "interventions_total": 3,
        "interventions": {"single_token_run": 2, "pattern_loop_len_2": 1},
        "tokens_saved": 94,
    }
