"""Text models through our adapter give mlx-lm's own greedy tokens, whatever the chunks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx_lm
import pytest

from tests.models.running import greedy
from tests.tiny_models import TEXT
from vllm_mlx.errors import EngineError
from vllm_mlx.models import loader
from vllm_mlx.models.span import MediaSpan

PROMPT = "What is in this picture? The quick brown fox jumps over the lazy dog. " * 4


@pytest.mark.parametrize("name", TEXT)
def test_tokens_equal_mlx_lm(name: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(name)
    model, tokenizer = mlx_lm.load(str(folder))
    token_ids = tokenizer.encode(PROMPT)
    expected = [r.token for r in mlx_lm.stream_generate(model, tokenizer, token_ids, max_tokens=20)]
    loaded = loader.load(folder)
    assert len(set(expected)) > 4, "weights so dull prove nothing"
    assert greedy(loaded.model, token_ids, len(expected)) == expected
    assert greedy(loaded.model, token_ids, 6, chunks=(1000,)) == expected[:6]


def test_one_token_prompts_work(tiny_model: Callable[..., Path]) -> None:
    for name in ("qwen3", "mamba2", "falcon_h1"):
        loaded = loader.load(tiny_model(name))
        assert len(greedy(loaded.model, [17], 3)) == 3


def test_a_model_whose_cache_cannot_be_batched_says_so(tiny_model: Callable[..., Path]) -> None:
    profile = loader.load(tiny_model("llama4")).profile
    assert not profile.runs_batched
    assert any("ChunkedKVCache" in note for note in profile.notes)
    assert loader.load(tiny_model("falcon_h1")).profile.runs_batched


def test_a_text_model_refuses_an_image_by_name(tiny_model: Callable[..., Path]) -> None:
    model = loader.load(tiny_model("qwen3")).model
    with pytest.raises(EngineError, match="cannot take image input"):
        model.encode(MediaSpan(0, 1, "image", b"x", {}))
