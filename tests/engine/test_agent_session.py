"""A conversation that grows turn by turn computes only what is new, on every kind of cache; counted in tokens."""

from __future__ import annotations

import random

import pytest

from tests import tiny_models
from tests.engine.harness import BLOCK, EngineHarness
from vllm_mlx.models.loader import load

NUM_TURNS = 8


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(20, 590) for _ in range(count)]


@pytest.fixture(scope="module", params=["qwen3", "gemma3_text", "qwen3_next", "deepseek_v3", "mamba2"])
def harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineHarness:
    folder = tiny_models.build(request.param, tmp_path_factory.mktemp("models") / request.param)
    return EngineHarness(load(folder).model, checkpoint_interval=512, chunk=64)


def test_each_turn_recomputes_less_than_two_blocks(harness: EngineHarness) -> None:
    """One block of rounding at the prompt's end, and one at the answer's."""
    rng = random.Random(4)
    conversation = words(rng, 500)
    num_new = len(conversation)
    for turn in range(NUM_TURNS):
        before = harness.scheduler.counters.num_prefilled_tokens
        answer = harness.lone(conversation, max_tokens=37, boundaries=(480,))
        computed = harness.scheduler.counters.num_prefilled_tokens - before
        assert computed <= num_new + 2 * BLOCK, f"turn {turn} computed {computed} tokens for {num_new} new ones"
        new = words(rng, 45)
        conversation += answer + new
        num_new = len(new)


def test_a_second_conversation_on_the_same_stem_meets_a_checkpoint_the_second_time(harness: EngineHarness) -> None:
    rng = random.Random(5)
    stem = words(rng, 300)
    costs = []
    for _ in range(3):
        before = harness.scheduler.counters.num_prefilled_tokens
        harness.lone(stem + words(rng, 30), max_tokens=2)
        costs.append(harness.scheduler.counters.num_prefilled_tokens - before)
    assert costs[2] <= 30 + BLOCK, f"third conversation computed {costs[2]} tokens"


def test_checkpoints_of_a_long_conversation_are_thinned(harness: EngineHarness) -> None:
    if not harness.cache.needs_checkpoint:
        assert all(node.checkpoint is None for node in harness.cache.nodes())
        return
    harness.cache.min_checkpoint_gap = BLOCK
    rng = random.Random(6)
    conversation = words(rng, 64)
    for _ in range(24):
        conversation += harness.lone(conversation, max_tokens=17) + words(rng, 15)
    tip = harness.cache.match(tuple(conversation))
    kept = sum(1 for node in tip.node.path() if node.checkpoint is not None)
    harness.cache.release(tip)
    assert 3 <= kept <= 14, f"{kept} checkpoints on a path of {len(conversation)} tokens"


def test_identical_prompts_at_once_are_prefilled_once(harness: EngineHarness) -> None:
    rng = random.Random(7)
    stem = words(rng, 320)
    before = harness.scheduler.counters.num_prefilled_tokens
    ids = [harness.ask(stem + words(rng, 10), max_tokens=3, boundaries=(320,)) for _ in range(6)]
    harness.run()
    computed = harness.scheduler.counters.num_prefilled_tokens - before
    assert computed <= 320 + 6 * (10 + BLOCK), f"computed {computed} tokens for 320 shared and 60 new ones"
    assert all(harness.answers[i].reason == "length" for i in ids)


def test_an_answer_that_comes_back_in_other_tokens_costs_no_more_than_itself(harness: EngineHarness) -> None:
    """Text does not always become the tokens that it was generated as; the prompt before it must still be found."""
    rng = random.Random(8)
    conversation = words(rng, 400)
    answer = harness.lone(conversation, max_tokens=40)
    retold = [*answer[:20], (answer[20] + 1) % 500 + 20, *answer[21:]]
    before = harness.scheduler.counters.num_prefilled_tokens
    new = words(rng, 30)
    harness.lone(conversation + retold + new, max_tokens=2)
    computed = harness.scheduler.counters.num_prefilled_tokens - before
    assert computed <= len(answer) + len(new) + BLOCK, f"computed {computed} tokens"
