"""PaliGemma, whose prompt tokens all see each other: one pass, one row at a time, mlx-vlm's own tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import EngineHarness
from tests.models.test_multimodal import mlx_vlm_greedy, mlx_vlm_inputs
from tests.tiny_vlms import picture
from vllm_mlx.engine.assembly import EngineOptions, build_engine
from vllm_mlx.engine.request import Prompt
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.models import loader

NUM_TOKENS = 12
TEXT = "<image>describe the thing"


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("paligemma")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return loader.load(folder)


def prompt_of(loaded: Any, seed: int = 1, text: str = TEXT) -> Prompt:
    return Prompt(*loaded.media.expand(text, [picture(seed)] if "<image>" in text else []))


def test_it_is_loaded_and_says_how_it_is_served(loaded: Any) -> None:
    profile = loaded.profile
    assert profile.is_multimodal and profile.modalities == {"text", "image"}
    assert not profile.runs_batched and not profile.shares_prefixes
    assert any("one request at a time" in note and "both directions" in note for note in profile.notes)


def test_tokens_equal_mlx_vlm_whatever_the_chunks(folder: Path, loaded: Any) -> None:
    prompt = prompt_of(loaded)
    inputs = mlx_vlm_inputs(folder, TEXT, [picture(1)])
    assert list(prompt.token_ids) == inputs["input_ids"][0].tolist()
    expected = mlx_vlm_greedy(folder, {k: v for k, v in inputs.items() if k not in ("labels", "token_type_ids")},
                              NUM_TOKENS)  # fmt: skip
    assert len(set(expected)) > 4
    for chunk in (16, 64):
        assert EngineHarness(loaded.model, prefix_bytes=0, chunk=chunk).lone(prompt, max_tokens=NUM_TOKENS) == expected
    assert EngineHarness(loaded.model, prefix_bytes=0).lone(prompt_of(loaded, 2), max_tokens=NUM_TOKENS) != expected


def test_rows_beside_each_other_and_after_preemption_are_the_row_alone(loaded: Any) -> None:
    prompts = [prompt_of(loaded, 1), prompt_of(loaded, 2), prompt_of(loaded, text="hello you")]
    alone = [EngineHarness(loaded.model, prefix_bytes=0).lone(p, max_tokens=NUM_TOKENS) for p in prompts]
    harness = EngineHarness(loaded.model, prefix_bytes=0)
    ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
    for turn in range(6):
        harness.step(2)
        running = list(harness.scheduler.running.values())
        if turn % 2 and running:
            harness.scheduler.preempt(running[turn % len(running)])
    harness.run()
    assert [harness.answers[i].tokens for i in ids] == alone


def test_no_prefix_is_kept(loaded: Any) -> None:
    options = EngineOptions(memory_bytes=1 << 30, prefix_cache_bytes=1 << 28)
    assert build_engine(loaded.model, options, lambda events, status: None).scheduler.cache is None


def test_a_second_picture_or_a_placeholder_in_a_text_is_refused(loaded: Any) -> None:
    with pytest.raises(InvalidRequest, match="1 image"):
        loaded.media.expand("<image><image>x", [picture(1), picture(2)])
    with pytest.raises(InvalidRequest, match="keeps for images"):
        loaded.media.expand("<image>x", [])


def test_its_chat_template_writes_the_picture_first_and_then_the_words(loaded: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What is it?"}, {"type": "image"}]},
    ]
    text = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<image>Be brief.\nWhat is it?"
