"""Guessing ahead: what is guessed, when it pays, and that no token of any kind of row changes by it."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest

from tests import tiny_models
from tests.engine.harness import EngineHarness
from tests.grammars import byte_tokenizer, compiler_for
from vllm_mlx.engine.draft_model import DraftModel
from vllm_mlx.engine.request import Constraint, Prompt, Request, SamplingParams, ThinkingBudget
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import AnswerPool, Costs, Lookup, NgramIndex, Speculator, best_length
from vllm_mlx.errors import SettingsError
from vllm_mlx.generation.request import OutputFormat
from vllm_mlx.models.base import LanguageModel
from vllm_mlx.models.loader import load


def row(tokens: list[int], namespace: str = "", **options: Any) -> Sequence:
    return Sequence(Request("r", Prompt(tuple(tokens)), 100, namespace=namespace, **options), 0, 0.0)


# ── what is guessed ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_index_finds_what_followed_the_last_time() -> None:
    rng = random.Random(1)
    for _ in range(50):
        tokens = [rng.randrange(6) for _ in range(rng.randrange(1, 80))]
        split = rng.randrange(len(tokens) + 1)
        index = NgramIndex(tokens[:split])
        for token in tokens[split:]:
            index.append(token)
        places = [i for i in range(3, len(tokens)) if tokens[i - 3 : i] == tokens[-3:]]
        assert index.find(index.last_key()) == (places[-1] if places and len(tokens) >= 3 else None)


def test_lookup_copies_on_from_where_the_text_agrees() -> None:
    lookup = Lookup([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4], None)
    assert lookup.draft(3) == (5, 6, 7)
    lookup.catch_up([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6])
    assert lookup.draft(2) == (7, 8)
    lookup.catch_up([1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5, 6, 1])
    assert lookup.draft(2) == ()


def test_a_repetition_is_thought_to_go_on() -> None:
    assert Lookup([9, 1, 2, 3, 1, 2, 3], None).draft(8) == (1, 2, 3, 1, 2, 3, 1, 2)


def test_rate_falls_where_guesses_fail_without_their_being_used() -> None:
    rng = random.Random(2)
    tokens = [rng.randrange(5) for _ in range(30)]
    lookup = Lookup(tokens, None)
    for _ in range(300):
        tokens.append(rng.randrange(5))
        lookup.catch_up(tokens)
    assert lookup.rate < 0.5


def test_earlier_answers_guess_for_requests_with_the_same_key_only() -> None:
    speculator = Speculator(always=True, max_draft=4)
    old = row([1, 2], "mine")
    old.tokens += [10, 11, 12, 13, 14, 15]
    speculator.remember(old)
    private = row([1, 2], "mine", skips_prefix_cache=True)
    private.tokens += [20, 21, 22, 23, 24, 25]
    speculator.remember(private)
    for namespace, tail, expected in (("mine", [10, 11, 12], (13, 14, 15)), ("other", [10, 11, 12], ()),
                                      ("mine", [20, 21, 22], ())):  # fmt: skip
        new = row([1, 2, *tail], namespace)
        assert speculator.draft(new, 4, 1) == expected
        speculator.close(new.id)


def test_pool_forgets_the_oldest_answers() -> None:
    pool = AnswerPool(max_tokens=100)
    answers = [[1000 * i + j for j in range(30)] for i in range(20)]
    for answer in answers:
        pool.add(answer)
    keys = [NgramIndex(answer[:3]).last_key() for answer in answers]
    assert pool.find(keys[0]) is None and pool.find(keys[-1]) == (answers[-1], 3)


# ── whether it pays ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_costs_are_a_line_through_the_steps_seen() -> None:
    costs = Costs()
    assert costs.of(4) is None
    for _ in range(100):
        for num_tokens in (1, 5, 9):
            costs.observe(num_tokens, 0.005 + 0.001 * num_tokens)
    assert costs.per_token == pytest.approx(0.001, rel=0.01)
    assert costs.of(3) == pytest.approx(0.008, rel=0.01)
    costs.observe(1, 60.0)  # the machine was stopped
    assert costs.of(1) == pytest.approx(0.006, rel=0.3)


def test_drafts_are_long_where_tokens_are_free_and_none_where_they_cost_as_much_as_a_step() -> None:
    assert best_length(0.95, 16, step_s=0.010, per_token_s=0.0002, num_rows=1) == 16
    assert best_length(0.95, 16, step_s=0.010, per_token_s=0.0097, num_rows=1) == 0
    assert best_length(0.05, 16, step_s=0.010, per_token_s=0.002, num_rows=1) == 0
    # A full batch: a kept token saves its row's share of the step only.
    assert best_length(0.9, 16, step_s=0.020, per_token_s=0.0012, num_rows=16) == 0


def test_a_row_whose_guesses_fail_stops_drafting_and_starts_again_when_they_hold() -> None:
    speculator = Speculator()
    for _ in range(60):
        speculator.observe(1, 1, 0, 0.010)
        speculator.observe(4, 1, 1, 0.016)
    rng = random.Random(3)
    one = row([1, 2, 3, 4] * 3)
    for _ in range(200):
        one.tokens.append(rng.randrange(8))
        speculator.expects(one, 1)
    assert speculator.draft(one, 8, 1) == ()
    for i in range(80):
        one.tokens.append(5 + i % 7)
        speculator.expects(one, 1)
    assert len(speculator.draft(one, 8, 1)) > 3


# ── that it changes nothing ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "qwen3")).model


class Prophet:
    """Guesses what another run has answered, with an error now and then."""

    def __init__(self, answers: dict[tuple[int, ...], list[int]]) -> None:
        self._answers = answers
        self._random = random.Random(4)

    def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
        done = row.num_completion_tokens
        guess = self._answers[row.request.prompt.token_ids][done : done + self._random.randint(1, limit)]
        return tuple(t if self._random.random() < 0.85 else 7 for t in guess)

    wants_states = False

    def saw(self, row: Sequence, start: int, states: object) -> None:
        pass

    def close(self, request_id: str) -> None:
        pass

    def bytes_for(self, num_tokens: int) -> int:
        return 0


def prompt(seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 590) for _ in range(20 + seed)]


def grammar() -> Callable[[], Constraint]:
    """Letters only."""
    wanted = OutputFormat("regex", "[a-z]{1,400}")
    return compiler_for(byte_tokenizer(), 600).output_format(wanted).maker()


CASES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"sampling": SamplingParams(temperature=0.9, top_p=0.9, seed=1)},
    "hot": {"sampling": SamplingParams(temperature=1.5, seed=2, num_logprobs=3)},
    "top_k, xtc": {"sampling": SamplingParams(temperature=1.0, top_k=9, seed=3, xtc_probability=0.5)},
    "logprobs": {"sampling": SamplingParams(num_logprobs=2)},
    "bias": {"sampling": SamplingParams(logit_bias={30: 4.0, 31: -100.0})},
    "penalties": {"sampling": SamplingParams(frequency_penalty=1.0, temperature=0.8, seed=4)},
    "min_tokens": {"sampling": SamplingParams(min_tokens=9), "stop_token_ids": frozenset(range(300))},
    "stop": {"stop_token_ids": frozenset(range(60))},
    "thinking": {"thinking": ThinkingBudget(9, (40, 41), (50, 51), (50, 51), starts_open=True)},
    "grammar": {"make_constraint": grammar()},
    "grammar, sampled": {"make_constraint": grammar(), "sampling": SamplingParams(temperature=1.2, seed=5)},
}


def test_every_kind_of_row_gets_its_own_tokens_and_logprobs(model: LanguageModel) -> None:
    plain = EngineHarness(model, max_rows=16)
    ids = [plain.ask(prompt(i), max_tokens=24, **options) for i, options in enumerate(CASES.values())]
    plain.run()
    answers = {tuple(prompt(i)): plain.answers[request_id].tokens for i, request_id in enumerate(ids)}
    speculator = Speculator(max_draft=5, model=Prophet(answers), uses_lookup=False, always=True)
    drafted = EngineHarness(model, max_rows=16, speculator=speculator)
    for i, options in enumerate(CASES.values()):
        drafted.ask(prompt(i), id=ids[i], max_tokens=24, **options)
        drafted.step(i % 3)
    drafted.run()
    for name, request_id in zip(CASES, ids, strict=True):
        one, other = plain.answers[request_id], drafted.answers[request_id]
        assert other.tokens == one.tokens and other.reason == one.reason, name
        assert len(other.events) < len(one.events) or name in ("penalties", "thinking"), f"{name}: nothing was guessed"
        for a, b in zip(_logprobs(one), _logprobs(other), strict=True):
            assert a.token_id == b.token_id and a.logprob == pytest.approx(b.logprob, abs=1e-4), name
            assert [t for t, _ in a.top] == [t for t, _ in b.top], name
    assert not drafted.runner._seats and drafted.scheduler.kv_bytes == 0


def _logprobs(answer: Any) -> list[Any]:
    return [entry for event in answer.events for entry in event.logprobs]


def test_a_repeated_request_is_drafted_from_its_first_answer_and_in_fewer_steps(model: LanguageModel) -> None:
    harness = EngineHarness(model, speculator=Speculator(always=True))
    first = harness.lone(prompt(3), max_tokens=40)
    steps = harness.engine.status().num_steps
    again = harness.lone(prompt(3), max_tokens=40)
    assert again == first
    assert harness.engine.status().num_steps - steps < 20


def test_prefixes_stored_after_drafts_are_right(model: LanguageModel) -> None:
    harness = EngineHarness(model, speculator=Speculator(always=True))
    answer = harness.lone(prompt(4), max_tokens=40)
    harness.lone(prompt(4), max_tokens=40)
    followup = prompt(4) + answer + prompt(5)
    assert harness.lone(followup) == EngineHarness(model, prefix_bytes=0).lone(followup)
    assert harness.cache.counters.num_cached_tokens > 40


def test_a_draft_model_that_agrees_saves_steps(model: LanguageModel) -> None:
    expected = [EngineHarness(model).lone(prompt(i), max_tokens=30) for i in range(3)]
    speculator = Speculator(max_draft=4, uses_lookup=False, model=DraftModel(model), always=True)
    harness = EngineHarness(model, speculator=speculator)
    ids = [harness.ask(prompt(i), max_tokens=30) for i in range(3)]
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == expected
    assert speculator.counters.num_kept > 0.9 * speculator.counters.num_drafted > 0
    assert harness.engine.status().num_steps < 20


def test_a_draft_model_that_errs_changes_no_token(
    model: LanguageModel, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = load(tiny_models.build("llama", tmp_path_factory.mktemp("models") / "llama")).model
    speculator = Speculator(max_draft=4, uses_lookup=False, model=DraftModel(other), always=True)
    harness = EngineHarness(model, speculator=speculator)
    assert harness.lone(prompt(1), max_tokens=30) == EngineHarness(model).lone(prompt(1), max_tokens=30)
    assert speculator.counters.num_drafted > 0


def test_a_draft_model_with_states_is_refused(tmp_path_factory: pytest.TempPathFactory) -> None:
    hybrid = load(tiny_models.build("qwen3_next", tmp_path_factory.mktemp("models") / "qwen3_next")).model
    with pytest.raises(SettingsError, match="cannot be taken back"):
        DraftModel(hybrid)
