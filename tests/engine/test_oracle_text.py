"""Greedy tokens of the engine equal mlx-lm's own single-stream generation, whatever goes on around a request."""

from __future__ import annotations

import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from tests import tiny_models
from tests.engine.harness import EngineHarness
from vllm_mlx.engine.guessing import NO_RING
from vllm_mlx.engine.kv_cache import Quantization
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import Speculator
from vllm_mlx.models.loader import load

MODELS = (
    "llama",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_5",
    "gemma3_text",
    "gpt_oss",
    "deepseek_v3",
    "mamba2",
    "falcon_h1",
    "llama4",
)
NUM_TOKENS = 14


class Subject:
    """A tiny model, loaded by mlx-lm and by us, with prompts and mlx-lm's answers to them."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        path = tiny_models.build(name, folder / name)
        self.reference, _ = load_model(path)
        self.model = load(path).model
        rng = random.Random(name)
        stem = [rng.randrange(20, 590) for _ in range(50)]
        lengths = (1, 5, 33, 70)
        self.prompts = [[rng.randrange(20, 590) for _ in range(n)] for n in lengths]
        self.prompts += [stem + [rng.randrange(20, 590) for _ in range(n)] for n in (3, 25)]
        self.prompts.append(stem + self.prompts[4][50:] + self.prompts[3])
        self.expected = [self.reference_tokens(prompt) for prompt in self.prompts]

    def reference_tokens(self, prompt: list[int]) -> list[int]:
        steps = generate_step(mx.array(prompt), self.reference, max_tokens=NUM_TOKENS)
        return [int(token) for token, _ in steps]


@pytest.fixture(scope="module", params=MODELS)
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return Subject(request.param, tmp_path_factory.mktemp("models"))


def test_every_model_but_few_computes_prompts_together(subject: Subject) -> None:
    runner = EngineHarness(subject.model).runner
    assert runner.can_pack == (subject.name not in {"falcon_h1", "llama4"})


def test_alone(subject: Subject) -> None:
    harness = EngineHarness(subject.model, prefix_bytes=0)
    for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
        assert harness.lone(prompt, max_tokens=NUM_TOKENS) == expected


def test_in_a_batch_that_rows_join_and_leave(subject: Subject) -> None:
    harness = EngineHarness(subject.model, prefix_bytes=0, chunk=16)
    rng = random.Random(1)
    asked = {}
    for _ in range(3):
        for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
            num = rng.choice([2, 7, NUM_TOKENS])
            asked[harness.ask(prompt, max_tokens=num)] = expected[:num]
            harness.step(rng.randrange(4))
        harness.engine.cancel(rng.choice(list(asked)))
    harness.run()
    for request_id, expected in asked.items():
        answer = harness.answers[request_id]
        assert answer.tokens == expected[: len(answer.tokens)]
        assert answer.reason == "cancelled" or answer.tokens == expected


def test_merged_into_one_group_and_of_equal_lengths(subject: Subject) -> None:
    rng = random.Random(2)
    prompts = [[rng.randrange(20, 590) for _ in range(21)] for _ in range(4)]
    expected = [subject.reference_tokens(prompt) for prompt in prompts]
    harness = EngineHarness(subject.model, prefix_bytes=0, chunk=256, slack_bytes=1 << 30)
    equal = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
    harness.step(5)
    mixed = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts[1:]]
    harness.run()
    assert [harness.answers[i].tokens for i in equal] == expected
    assert [harness.answers[i].tokens for i in mixed] == subject.expected[1:]


def test_prompts_computed_together(subject: Subject) -> None:
    rng = random.Random(3)
    stem = subject.prompts[4][:48]
    prompts = [[rng.randrange(20, 590) for _ in range(n)] for n in (35, 40, 38, 33, 2, 2)]
    prompts += [stem + [rng.randrange(20, 590) for _ in range(n)] for n in (9, 12, 10)]  # behind a prefix hit
    expected = [subject.reference_tokens(prompt) for prompt in prompts]
    for chunk, least in ((256, 6), (64, 2)):
        harness = EngineHarness(subject.model, chunk=chunk, max_rows=16)
        harness.lone(stem, max_tokens=1)
        ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
        harness.run()
        assert [harness.answers[i].tokens for i in ids] == expected
        assert not harness.runner.can_pack or harness.runner.metrics()["num_packed_chunks"] >= least


class Prophet:
    """A draft source that knows the answers, and errs now and then."""

    def __init__(self, known: dict[tuple[int, ...], list[int]], seed: int) -> None:
        self._known = known
        self._random = random.Random(seed)

    def draft(self, row: Sequence, limit: int) -> tuple[int, ...]:
        answer = self._known[row.request.prompt.token_ids]
        done = row.num_completion_tokens
        guess = answer[done : done + self._random.randint(1, limit)]
        return tuple(t if self._random.random() < 0.8 else 21 for t in guess)

    wants_states = False

    def saw(self, row: Sequence, start: int, states: object) -> None:
        pass

    def close(self, request_id: str) -> None:
        pass

    def bytes_for(self, num_tokens: int) -> int:
        return 0


def test_verified_drafts_change_no_token(subject: Subject) -> None:
    known = {tuple(p): e for p, e in zip(subject.prompts, subject.expected, strict=True)}
    for seed in (1, 2):
        speculator = Speculator(max_draft=6, model=Prophet(known, seed), uses_lookup=False, always=True)
        harness = EngineHarness(subject.model, chunk=64, speculator=speculator)
        rng = random.Random(seed)
        asked = {}
        for _ in range(2):
            for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
                num = rng.choice([2, 7, NUM_TOKENS])
                asked[harness.ask(prompt, max_tokens=num)] = expected[:num]
                harness.step(rng.randrange(4))
            harness.engine.cancel(rng.choice(list(asked)))
        harness.run()
        for request_id, expected in asked.items():
            answer = harness.answers[request_id]
            assert answer.tokens == expected[: len(answer.tokens)]
            assert answer.reason == "cancelled" or answer.tokens == expected
        most = harness.runner.guessing.most_draft
        least = 4 if most < NO_RING else 20  # windows go round after 24 tokens
        assert not most or speculator.counters.num_kept > least
        assert not harness.runner._seats and harness.scheduler.kv_bytes == 0


def test_every_model_but_those_with_recurrent_layers_speculates(subject: Subject) -> None:
    runner = EngineHarness(subject.model).runner
    assert bool(runner.guessing.most_draft) == (
        subject.name not in {"falcon_h1", "llama4", "mamba2", "qwen3_next", "qwen3_5"}
    )


def test_after_prefix_hits(subject: Subject) -> None:
    harness = EngineHarness(subject.model)
    for _ in range(2):
        for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
            assert harness.lone(prompt, max_tokens=NUM_TOKENS) == expected
    assert harness.cache.counters.num_cached_tokens > 0, "nothing was reused, so nothing was tested"
    assert not harness.runner._seats and harness.scheduler.kv_bytes == 0


def test_after_preemption(subject: Subject) -> None:
    probe = EngineHarness(subject.model, prefix_bytes=0)
    budget = probe.runner.bytes_for(90) + 2 * probe.runner.bytes_for(40)
    harness = EngineHarness(subject.model, prefix_bytes=0, kv_budget_bytes=budget, max_rows=6)
    ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts]
    harness.run()
    for request_id, expected in zip(ids, subject.expected, strict=True):
        answer = harness.answers[request_id]
        assert answer.reason is not None
        if answer.last.detail is None:
            assert answer.tokens == expected


def test_quantised_kv_is_the_same_alone_and_in_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wide_heads = dict(tiny_models.TEXT["llama"], num_attention_heads=2, num_key_value_heads=1)
    monkeypatch.setitem(tiny_models.TEXT, "llama", wide_heads)
    subject = Subject("llama", tmp_path)
    quantization = Quantization(bits=8, group_size=32)
    alone = EngineHarness(subject.model, prefix_bytes=0, quantization=quantization)
    expected = [alone.lone(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts]
    together = EngineHarness(subject.model, quantization=quantization, chunk=256)
    ids = [together.ask(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts]
    together.run()
    assert [together.answers[i].tokens for i in ids] == expected
