"""Gemma 4 with ears: sounds are spans of the prompt, and the tokens are mlx-vlm's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx_vlm
import numpy as np
import pytest

from tests.engine.harness import EngineHarness
from tests.models.running import greedy
from tests.models.test_multimodal import mlx_vlm_greedy
from tests.tiny_vlms import picture
from vllm_mlx.engine.request import Prompt
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.models import loader
from vllm_mlx.models.span import SoundClip

NUM_TOKENS = 12


def tone(seconds: float, hertz: float = 440.0) -> SoundClip:
    time = np.arange(int(16_000 * seconds), dtype=np.float32) / 16_000
    return SoundClip(np.sin(2 * np.pi * hertz * time) * np.float32(0.5))


@pytest.fixture(scope="module")
def folder(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("gemma4_audio")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    return loader.load(folder)


def rendered(loaded: Any, *kinds: str) -> str:
    content = [{"type": "text", "text": "Hear: "}, *({"type": k} for k in kinds), {"type": "text", "text": "what?"}]
    messages = [{"role": "user", "content": content}]
    text: str = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def test_it_takes_sound_and_the_checkpoint_without_ears_does_not(loaded: Any, tiny_model: Callable[..., Path]) -> None:
    assert loaded.profile.modalities == {"text", "image", "audio"}
    assert loader.load(tiny_model("gemma4")).profile.modalities == {"text", "image"}


@pytest.mark.parametrize("seconds", [0.5, 1.37])
def test_tokens_equal_mlx_vlm(folder: Path, loaded: Any, seconds: float) -> None:
    text, clip = rendered(loaded, "audio"), tone(seconds)
    _, processor = mlx_vlm.load(str(folder))
    inputs = dict(processor(text=[text], audio=[clip.samples], add_special_tokens=False))
    token_ids, spans = loaded.media.expand(text, [], [clip])
    assert list(token_ids) == inputs["input_ids"][0].tolist() and spans[0].kind == "audio"
    expected = mlx_vlm_greedy(folder, inputs, NUM_TOKENS)
    assert len(set(expected)) > 4
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected


def test_sounds_and_pictures_beside_text_rows_are_what_they_are_alone(loaded: Any) -> None:
    shots = [((), ()), ((), (tone(0.6),)), ((picture(1),), (tone(0.6), tone(0.4, 900))), ((), (tone(0.6, 900),))]
    prompts = []
    for images, clips in shots:
        text = rendered(loaded, *["image"] * len(images), *["audio"] * len(clips))
        prompts.append(Prompt(*loaded.media.expand(text, images, clips)))
    alone = [greedy(loaded.model, p.token_ids, NUM_TOKENS, media=p.media) for p in prompts]
    assert alone[1] != alone[3], "another sound, another answer"
    harness = EngineHarness(loaded.model, chunk=16)
    for _ in range(2):
        ids = [harness.ask(prompt, max_tokens=NUM_TOKENS) for prompt in prompts]
        harness.run()
        assert [harness.answers[i].tokens for i in ids] == alone
    assert harness.cache.counters.num_cached_tokens > 0


def test_a_sound_longer_than_the_model_hears_is_refused(loaded: Any) -> None:
    with pytest.raises(InvalidRequest, match="at most 2 seconds"):
        loaded.media.expand(rendered(loaded, "audio"), [], [tone(2.1)])
