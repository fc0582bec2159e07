"""Prompts with pictures, batched with text rows, chunked, reused and preempted: the tokens of the request alone.

`tests/models/test_multimodal.py` shows that the adapter alone equals mlx-vlm; here everything around it moves.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import EngineHarness
from tests.models.running import greedy
from tests.models.test_multimodal import rendered
from tests.tiny_vlms import VLM_NAMES, picture
from vllm_mlx.engine.request import Prompt
from vllm_mlx.models import loader

NUM_TOKENS = 12


class Subject:
    """A tiny multimodal model with prompts of zero, one and two pictures, and the answers to each alone."""

    def __init__(self, folder: Path) -> None:
        loaded: Any = loader.load(folder)
        self.model = loaded.model
        shots = [[], [picture(1)], [picture(1), picture(2, (64, 130))], [picture(3)], [picture(2)]]
        self.prompts = []
        for images in shots:
            token_ids, spans = loaded.media.expand(rendered(loaded, len(images)), images)
            self.prompts.append(Prompt(token_ids, spans, boundaries=(len(token_ids) - 4,)))
        self.expected = [greedy(self.model, p.token_ids, NUM_TOKENS, media=p.media) for p in self.prompts]


@pytest.fixture(scope="module", params=VLM_NAMES)
def subject(request: pytest.FixtureRequest, tiny_model: Callable[..., Path]) -> Subject:
    return Subject(tiny_model(request.param))


def test_batched_with_text_rows_in_odd_chunks(subject: Subject) -> None:
    harness = EngineHarness(subject.model, prefix_bytes=0, chunk=16)
    ids = []
    for number, prompt in enumerate(subject.prompts):
        ids.append(harness.ask(prompt, max_tokens=NUM_TOKENS))
        harness.step(number)
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == subject.expected


def test_reused_prefixes_keep_pictures_apart(subject: Subject) -> None:
    harness = EngineHarness(subject.model, checkpoint_interval=16)
    for _ in range(2):
        for prompt, expected in zip(subject.prompts, subject.expected, strict=True):
            assert harness.lone(prompt, max_tokens=NUM_TOKENS) == expected
    assert harness.cache.counters.num_cached_tokens > 0


def test_a_second_question_about_a_picture_runs_no_encoder(subject: Subject) -> None:
    harness = EngineHarness(subject.model, prefix_bytes=0)
    harness.lone(subject.prompts[1], max_tokens=2)
    encoded = []
    encode = subject.model.encode
    subject.model.encode = lambda span: encoded.append(span) or encode(span)
    try:
        harness.lone(subject.prompts[1], max_tokens=2)
        assert not encoded
        harness.lone(subject.prompts[3], max_tokens=2)
        assert len(encoded) == 1
    finally:
        subject.model.encode = encode


def test_after_preemption(subject: Subject) -> None:
    harness = EngineHarness(subject.model, prefix_bytes=0)
    ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts]
    for turn in range(8):
        harness.step(2)
        running = list(harness.scheduler.running.values())
        if turn % 2 and running:
            harness.scheduler.preempt(running[turn % len(running)])
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == subject.expected


def test_prefixes_that_come_back_from_disk_keep_pictures_apart(subject: Subject, tmp_path: Path) -> None:
    first = EngineHarness(subject.model, checkpoint_interval=16, disk=tmp_path, disk_min_tokens=16)
    for prompt in subject.prompts:
        first.lone(prompt, max_tokens=2)
    first.stop()
    second = EngineHarness(subject.model, checkpoint_interval=16, disk=tmp_path, disk_min_tokens=16)
    assert second.tier is not None
    answers = [second.lone(prompt, max_tokens=NUM_TOKENS) for prompt in subject.prompts]
    second.stop()
    assert answers == subject.expected
    # Prompts of these tokenizers may be too short to be worth a read; where they are not, they were read.
    if max(len(prompt) for prompt in subject.prompts) > 100:
        assert second.tier.metrics()["disk_cache"]["num_restored_tokens"] > 0
