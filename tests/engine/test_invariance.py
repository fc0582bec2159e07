"""With batch invariance a request gives the same tokens in any company, of text and of pictures, by every way there is.

Log-probabilities are compared up to a rounding: the model's logits are the same bits, but their logarithm is taken of
all rows at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Answer, EngineHarness, sampled
from tests.models.test_multimodal import rendered
from tests.tiny_vlms import picture
from vllm_mlx.engine import invariance
from vllm_mlx.engine.invariance import FREE, PADDED, SINGLE
from vllm_mlx.engine.request import Prompt
from vllm_mlx.models import loader

Case = tuple[Prompt, int]


def random_texts(count: int, seed: int) -> list[Case]:
    """Prompts of 1 to 300 tokens, two thirds of them beginning alike, with their answer's length."""
    rng = random.Random(seed)
    stems = [[rng.randrange(20, 590) for _ in range(length)] for length in (50, 210)]

    def prompt() -> Prompt:
        stem = rng.choice([*stems, []])
        shared = rng.choice([len(stem), rng.randrange(len(stem) + 1)])
        own = [rng.randrange(20, 590) for _ in range(rng.randrange(1, 90))]
        return Prompt((*stem[:shared], *own))

    return [(prompt(), rng.randrange(1, 20)) for _ in range(count)]


def ask(harness: EngineHarness, case: Case) -> Answer:
    prompt, max_tokens = case
    request_id = harness.ask(prompt, max_tokens=max_tokens, sampling=sampled(temperature=0, num_logprobs=0))
    return harness.answers[request_id]


def logprobs(answer: Answer) -> list[float]:
    return [entry.logprob for event in answer.events for entry in event.logprobs]


def assert_equal_in_any_company(model: Any, cases: list[Case], **options: Any) -> EngineHarness:
    """Each case alone, without a cache; then all at random moments, sharing prefixes, in groups and in small chunks,
    and some of them preempted, at random moments too."""
    alone = EngineHarness(model, prefix_bytes=0, chunk=512, **options)
    expected = []
    for case in cases:
        expected.append(ask(alone, case))
        alone.run()
    together = EngineHarness(model, max_rows=24, chunk=48, slack_bytes=1 << 24, **options)
    rng, answers = random.Random(1), []
    num_repeated, num_left = 0, len(cases) // 3
    while len(answers) < len(cases) or together.engine.has_work:
        if len(answers) < len(cases) and rng.random() < 0.6:
            answers.append(ask(together, cases[len(answers)]))
        together.step()
        farthest = max(together.scheduler.running.values(), key=lambda s: s.num_completion_tokens, default=None)
        if farthest is not None and farthest.num_completion_tokens > 2 and num_left and rng.random() < 0.3:
            num_left -= 1
            num_repeated += farthest.num_completion_tokens
            together.scheduler.preempt(farthest)
    assert num_repeated > len(cases), "hardly an answer was computed again, so nothing was tested"
    assert max(status.num_running for status in together.statuses) > 1, "nothing was batched, so nothing was tested"
    assert together.cache.counters.num_cached_tokens > 0, "nothing was reused, so nothing was tested"
    for answer, lone in zip(answers, expected, strict=True):
        assert answer.tokens == lone.tokens
        assert logprobs(answer) == pytest.approx(logprobs(lone), rel=1e-6, abs=1e-6)
    return together


@pytest.mark.parametrize(("name", "count", "options"), [
    ("qwen3", 60, {}), ("qwen3", 10, {"dtype": "bfloat16", "quantize_bits": 4}), ("qwen3_moe", 20, {}),
    ("qwen3_next", 16, {})])  # fmt: skip
def test_text(tiny_model: Callable[..., Path], name: str, count: int, options: dict[str, Any]) -> None:
    model = loader.load(tiny_model(name, **options), dtype="keep").model
    assert_equal_in_any_company(model, random_texts(count, seed=3), is_invariant=True)


def test_pictures(tiny_model: Callable[..., Path]) -> None:
    loaded: Any = loader.load(tiny_model("qwen3_vl"))
    cases = random_texts(16, seed=4)
    for number in range(16):
        images = [picture(number % 5)] * (1 + number % 2)
        token_ids, spans = loaded.media.expand(rendered(loaded, len(images)), images)
        cases.insert(2 * number, (Prompt(token_ids, spans), 3 + number % 7))
    assert_equal_in_any_company(loaded.model, cases, is_invariant=True)


@pytest.mark.parametrize("way", [PADDED, SINGLE], ids=lambda way: way.name)
def test_each_way_holds_by_itself(tiny_model: Callable[..., Path], way: invariance.Invariance) -> None:
    model = loader.load(tiny_model("qwen3")).model
    harness = assert_equal_in_any_company(model, random_texts(30, seed=5), invariance=way)
    # Empty rows fill up a padded step; in a single one nothing stands side by side.
    assert max(status.extra["batch_rows"] for status in harness.statuses) == (16 if way is PADDED else 0)


def test_the_way_is_chosen_by_what_the_model_does(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out from the model's own logits: one whose rows depend on their number is padded, or goes row by row."""
    model = loader.load(tiny_model("qwen3")).model
    plain = model.decode

    def by_number_of_rows(tokens: Any, positions: Any, cache: Any, states: Any) -> Any:
        return plain(tokens, positions, cache, states) * (1 + len(positions) * 1e-3)

    def by_neighbours(tokens: Any, positions: Any, cache: Any, states: Any) -> Any:
        return plain(tokens, positions, cache, states) + sum(positions) * 1e-3

    def chosen() -> invariance.Invariance:
        return EngineHarness(model, is_invariant=True).runner.invariance

    monkeypatch.setattr(invariance.Probe, "ignores_chunks", lambda probe: True)
    assert chosen() == FREE
    monkeypatch.setattr(model, "decode", by_number_of_rows)
    assert chosen() == PADDED
    monkeypatch.setattr(model, "decode", by_neighbours)
    assert chosen() == SINGLE
