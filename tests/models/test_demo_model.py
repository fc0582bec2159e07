"""The model that ships with the package loads by path through both stacks, which agree about its text."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import mlx_lm
import pytest
from PIL import Image, ImageDraw

from tests.models.running import greedy
from tests.models.test_multimodal import mlx_vlm_greedy, mlx_vlm_inputs
from vllm_mlx.models import loader
from vllm_mlx.models.profile import read_profile

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def demo() -> Iterator[Path]:
    with as_file(files("vllm_mlx") / "demo") as folder:
        yield folder


def rendered(loaded: Any, *parts: dict[str, str]) -> str:
    messages = [{"role": "user", "content": list(parts)}]
    text: str = loaded.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return text


def red_circle() -> Image.Image:
    image = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 130, 130), fill="red")
    return image


def test_its_profile_is_whole(demo: Path) -> None:
    profile = read_profile(demo)
    assert profile.model_type == "qwen3_vl" and profile.is_multimodal
    assert profile.chat_template and len(profile.eos_token_ids) >= 1
    assert profile.context_tokens >= 4096


def test_both_stacks_give_the_same_text(demo: Path) -> None:
    as_text, with_tower = loader.load(demo, mllm=False), loader.load(demo)
    token_ids = as_text.tokenizer.encode(rendered(as_text, {"type": "text", "text": "Reply with pong"}))
    same_ids, _ = with_tower.media.expand(rendered(with_tower, {"type": "text", "text": "Reply with pong"}))
    assert list(same_ids) == token_ids
    model, tokenizer = mlx_lm.load(str(demo))
    expected = [r.token for r in mlx_lm.stream_generate(model, tokenizer, token_ids, max_tokens=NUM_TOKENS)]
    assert greedy(as_text.model, token_ids, len(expected)) == expected
    assert greedy(with_tower.model, token_ids, len(expected)) == expected


def test_a_picture_gives_mlx_vlms_own_tokens(demo: Path) -> None:
    loaded = loader.load(demo)
    text = rendered(loaded, {"type": "image"}, {"type": "text", "text": "What is in the picture?"})
    token_ids, spans = loaded.media.expand(text, [red_circle()])
    inputs = mlx_vlm_inputs(demo, text, [red_circle()])
    assert list(token_ids) == inputs["input_ids"][0].tolist()
    expected = mlx_vlm_greedy(demo, inputs, NUM_TOKENS)
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected
