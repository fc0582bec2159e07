"""The runner on a tiny model: logprobs, failures of single rows, memory given back, samplers side by side."""

from __future__ import annotations

import random
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from tests import tiny_models
from tests.engine.harness import EngineHarness
from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.models.base import LanguageModel
from vllm_mlx.models.loader import load


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    return load(tiny_models.build("qwen3", tmp_path_factory.mktemp("models") / "qwen3")).model


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(20, 590) for _ in range(length)]


def test_prompt_logprobs_are_those_of_one_whole_forward(model: LanguageModel) -> None:
    tokens = prompt(70)
    row = EngineHarness(model).runner.layout.new_row()
    logits = model.prefill(mx.array([tokens]), 0, row.entries, None, {})[0]
    expected = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    harness = EngineHarness(model, chunk=16)
    harness.lone(tokens, max_tokens=1)  # so that a prefix is there, and must not be used
    request_id = harness.ask(tokens, max_tokens=2, num_prompt_logprobs=3)
    harness.run()
    found = harness.answers[request_id].events[0].prompt_logprobs
    assert [entry.token_id for entry in found] == tokens[1:]
    for position, entry in enumerate(found):
        assert entry.logprob == pytest.approx(expected[position, tokens[position + 1]], abs=1e-4)
        assert entry.top[0][0] == expected[position].argmax() and len(entry.top) == 3


def test_rows_with_different_samplers_do_not_touch_each_other(model: LanguageModel) -> None:
    settings = [
        SamplingParams(),
        SamplingParams(temperature=1.3, seed=1),
        SamplingParams(temperature=0.8, top_p=0.7, seed=2),
        SamplingParams(temperature=1.0, top_k=5, seed=3, presence_penalty=1.0),
        SamplingParams(frequency_penalty=1.5),
        SamplingParams(repetition_penalty=1.4, num_logprobs=2),
    ]
    alone = [EngineHarness(model).lone(prompt(20, i), sampling=s) for i, s in enumerate(settings)]
    together = EngineHarness(model)
    ids = []
    for i, s in enumerate(settings):
        ids.append(together.ask(prompt(20, i), sampling=s))
        together.step(i % 3)
    together.run()
    assert [together.answers[i].tokens for i in ids] == alone


def test_a_seeded_row_is_repeated_after_preemption(model: LanguageModel) -> None:
    sampling = SamplingParams(temperature=1.5, seed=9, frequency_penalty=0.5)
    expected = EngineHarness(model).lone(prompt(40), max_tokens=20, sampling=sampling)
    harness = EngineHarness(model, prefix_bytes=0)
    request_id = harness.ask(prompt(40), max_tokens=20, sampling=sampling)
    harness.step(9)
    harness.scheduler.preempt(harness.scheduler.running[request_id])
    harness.run()
    assert harness.answers[request_id].tokens == expected


def test_memory_is_given_back_when_all_rows_have_left(model: LanguageModel) -> None:
    harness = EngineHarness(model, prefix_bytes=0)
    for i in range(8):
        harness.ask(prompt(30 + i, i), max_tokens=3 + i)
    harness.run()
    metrics = harness.runner.metrics()
    assert metrics["batch_rows"] == 0 and metrics["kv_held_bytes"] == 0
    assert harness.scheduler.kv_bytes == 0


def test_a_long_row_that_leaves_lets_the_buffers_shrink(model: LanguageModel) -> None:
    harness = EngineHarness(model, prefix_bytes=0)
    long = harness.ask(prompt(900), max_tokens=12)
    while not harness.answers[long].events:
        harness.step()
    short = harness.ask(prompt(10), max_tokens=60)
    expected = EngineHarness(model).lone(prompt(10), max_tokens=60)
    harness.step(6)
    widest = harness.runner.metrics()["kv_held_bytes"]
    harness.step(30)
    assert harness.runner.metrics()["kv_held_bytes"] < widest / 3
    harness.run()
    assert harness.answers[short].tokens == expected


def test_footprint_is_what_a_row_really_holds(model: LanguageModel) -> None:
    runner = EngineHarness(model).runner
    config = model.profile
    row = runner.layout.new_row()
    model.prefill(mx.array([prompt(256)]), 0, row.entries, None, {})
    assert runner.bytes_for(256) == sum(a.nbytes for a in row.state), config.name
    assert runner.bytes_for(0) == 0


def test_a_row_whose_logits_are_not_numbers_fails_alone(model: LanguageModel) -> None:
    harness = EngineHarness(model, prefix_bytes=0)
    good = harness.ask(prompt(20, 1), max_tokens=8)
    bad = harness.ask(prompt(20, 2), max_tokens=8)
    harness.step(3)
    batch = harness.runner._batch
    assert batch is not None
    group, row = batch._places[bad]
    group.cache.layers[0].values[row] = float("nan")
    harness.run()
    assert harness.answers[bad].reason == "error" and "finite" in (harness.answers[bad].last.detail or "")
    assert harness.answers[good].tokens == EngineHarness(model).lone(prompt(20, 1), max_tokens=8)


def test_rows_of_any_lengths_hold_little_more_than_their_tokens(model: LanguageModel) -> None:
    rng = random.Random(3)
    mixes = ([900] + [40] * 31, [rng.randrange(30, 1200) for _ in range(24)], [200] * 16)
    for lengths in mixes:
        harness = EngineHarness(model, prefix_bytes=0, max_rows=32, chunk=256)
        for i, length in enumerate(lengths):
            harness.ask(prompt(length, i), max_tokens=24)
        worst = 1.0
        while harness.engine.has_work:
            harness.step()
            metrics = harness.runner.metrics()
            if metrics["batch_groups"]:
                worst = max(worst, float(metrics["kv_waste_ratio"]))
        assert worst <= 1.25, f"{worst:.2f} times the bytes of the tokens alive for {lengths}"


def test_compacting_copies_only_what_becomes_smaller(model: LanguageModel) -> None:
    harness = EngineHarness(model, prefix_bytes=0, max_rows=32, chunk=256)
    ids = [harness.ask(prompt(200, i), max_tokens=60) for i in range(4)]
    while len(harness.runner._batch or ()) < 4:
        harness.step()
    harness.step(12)
    batch = harness.runner._batch
    assert batch is not None and batch.num_groups == 1
    (group,) = batch._groups
    copies: list[tuple[int, int]] = []
    reserve, select = group.cache.reserve, group.cache.select

    def noted(method: Any) -> Any:
        def call(*args: Any) -> None:
            before = group.cache.num_rows, group.cache.num_tokens
            method(*args)
            copies.extend({(group.cache.num_rows, group.cache.num_tokens)} - {before})

        return call

    group.cache.reserve, group.cache.select = noted(reserve), noted(select)  # type: ignore[method-assign]
    group.compact()
    assert not copies or copies[0][1] < batch.held_tokens
    group.compact()
    assert len(copies) <= 1, "nothing was left to give back"
    harness.engine.cancel(ids[1])
    harness.step()
    group.compact()
    assert group.cache.num_rows == 3 and group.rows == [ids[0], ids[2], ids[3]]


def test_a_join_copies_nobody_elses_rows(model: LanguageModel) -> None:
    harness = EngineHarness(model, prefix_bytes=0, max_rows=32, chunk=256)
    for i in range(8):
        harness.ask(prompt(400, i), max_tokens=40)
    while len(harness.runner._batch or ()) < 8:
        harness.step()
    harness.step(12)
    batch = harness.runner._batch
    assert batch is not None and batch.num_groups == 1
    (group,) = batch._groups
    harness.ask(prompt(350, 99), max_tokens=5)
    harness.step(4)
    assert len(batch) == 9 and batch.num_groups == 2 and batch._groups[0] is group and len(group.rows) == 8
