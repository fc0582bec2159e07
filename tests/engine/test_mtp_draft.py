"""Heads for the token after next: what they guess is what the head says, and no text depends on it."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import pytest

from tests import tiny_models, tiny_mtp
from tests.engine.harness import EngineHarness, sampled
from vllm_mlx.engine.assembly import EngineOptions, build_engine
from vllm_mlx.engine.mtp_draft import MAX_CHAIN, MtpDraft
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import Speculator
from vllm_mlx.models.loader import load
from vllm_mlx.models.mtp import MtpTextModel


@pytest.fixture(scope="module", params=tiny_mtp.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(family: str, tmp_path_factory: pytest.TempPathFactory) -> MtpTextModel:
    return opened(tiny_mtp.build(family, tmp_path_factory.mktemp("models") / family))


def opened(folder: Any) -> MtpTextModel:
    made = load(folder, with_head=True).model
    assert isinstance(made, MtpTextModel)
    return made


def prompt(seed: int, length: int = 20) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 590) for _ in range(length + seed)]


def guessing(model: MtpTextModel, draft: MtpDraft | None = None, *, most: int = 3) -> EngineHarness:
    speculator = Speculator(max_draft=most, uses_lookup=False, model=draft or MtpDraft(model), always=True)
    return EngineHarness(model, speculator=speculator, max_rows=16)


def test_the_model_says_the_same_with_its_head_as_without(family: str, model: MtpTextModel) -> None:
    plain = load(model.profile.path).model
    assert not isinstance(plain, MtpTextModel)
    tokens = mx.array([prompt(1)], dtype=mx.int32)
    ours, theirs = (m.prefill(tokens, 0, m.make_cache(), None, {}) for m in (model, plain))
    assert mx.array_equal(ours, theirs)


class Watched(MtpDraft):
    """Compares every guess with the head run over the whole row from the beginning."""

    num_checked = 0

    def __init__(self, model: MtpTextModel) -> None:
        super().__init__(model)
        self._whole = model

    def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
        guesses = super().draft(row, limit)
        assert 0 < len(guesses) <= min(limit, MAX_CHAIN)
        kept, self._whole.states = self._whole.states, None
        tokens = mx.array(row.tokens, dtype=mx.int32)[None]
        self._whole.prefill(tokens[:, :-1], 0, self._whole.make_cache(), None, {})
        states, following = self._whole.states, tokens[:, 1:]
        for guess in guesses:
            out, on = self._whole.head(states, self._whole.embed(following), self._whole.make_head_cache()[0])
            assert guess == int(mx.argmax(self._whole.logits(out[:, -1])).item())
            states = mx.concatenate([states, on[:, -1:]], axis=1)
            following = mx.concatenate([following, mx.array([[guess]], dtype=mx.int32)], axis=1)
        self._whole.states = kept
        self.num_checked += len(guesses)
        return guesses


def test_a_guess_is_what_the_head_says_of_the_whole_row(model: MtpTextModel) -> None:
    """Rows come at different times, their prompts in chunks and in packs; most guesses are wrong and taken back."""
    draft = Watched(model)
    harness = guessing(model, draft)
    ids = []
    for i in range(4):
        ids.append(harness.ask(prompt(i, 90 if i == 2 else 20), max_tokens=12))
        harness.step(i % 3)
    harness.run()
    assert draft.num_checked > 60
    for i, request_id in enumerate(ids):
        expected = EngineHarness(model).lone(prompt(i, 90 if i == 2 else 20), max_tokens=12)
        assert harness.answers[request_id].tokens == expected
    assert not draft._rows and not harness.runner._seats and harness.scheduler.kv_bytes == 0


def test_a_head_that_is_right_saves_steps(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    model = opened(tiny_mtp.build(family, tmp_path_factory.mktemp("models") / family, is_perfect=True))
    expected = [EngineHarness(model).lone(prompt(i), max_tokens=31) for i in range(3)]
    harness = guessing(model)
    ids = [harness.ask(prompt(i), max_tokens=31) for i in range(3)]
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == expected
    speculator = harness.runner.speculator
    assert speculator is not None and speculator.counters.num_kept == speculator.counters.num_drafted > 60
    assert harness.engine.status().num_steps < 20


def test_sampled_rows_stay_what_they_are(model: MtpTextModel) -> None:
    how = {"sampling": sampled(temperature=0.8, top_p=0.9, seed=3), "max_tokens": 16}
    assert guessing(model).lone(prompt(2), **how) == EngineHarness(model).lone(prompt(2), **how)


def test_a_prompt_whose_beginning_was_cached_is_guessed_from_where_it_is_computed(model: MtpTextModel) -> None:
    harness = guessing(model)
    first = harness.lone(prompt(3, 60), max_tokens=10)
    assert harness.lone(prompt(3, 60), max_tokens=10) == first
    assert harness.cache.counters.num_cached_tokens > 0
    speculator = harness.runner.speculator
    assert speculator is not None and speculator.counters.num_drafted > 10


def test_states_that_nobody_asks_for_do_not_pile_up(model: MtpTextModel) -> None:
    class Idle(MtpDraft):
        most = 0

        def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
            self.most = max(self.most, self._rows[row.id].end - self._rows[row.id].done)
            return ()

    draft = Idle(model)
    guessing(model, draft).lone(prompt(1), max_tokens=150)
    assert 60 < draft.most <= 66


def test_an_engine_uses_the_head_where_there_is_one(model: MtpTextModel) -> None:
    for speculation, has_head in (("auto", True), ("off", False)):
        options = EngineOptions(memory_bytes=1 << 28, prefix_cache_bytes=0, speculation=speculation)
        runner: Any = build_engine(model, options, lambda events, status: None).runner
        assert (runner.speculator is not None and runner.speculator.wants_states) is has_head


def test_a_checkpoint_without_a_head_or_with_another_one_goes_without(tmp_path_factory: Any) -> None:
    folder = tiny_models.build("mimo", tmp_path_factory.mktemp("models") / "mimo")
    assert not isinstance(load(folder, with_head=True).model, MtpTextModel)
    odd = {"model.mtp_layers.0.token_layernorm.weight": mx.ones(64), "model.mtp_layers.0.surprise.weight": mx.ones(3)}
    mx.save_safetensors(str(folder / "model-mtp.safetensors"), odd)
    assert not isinstance(load(folder, with_head=True).model, MtpTextModel)
