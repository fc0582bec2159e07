"""Multimodal models through our adapter give mlx-vlm's own greedy tokens, with pictures split over any chunks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx_vlm
import pytest
from mlx_vlm.generate import generate_step
from mlx_vlm.models.llava_onevision import Model as OneVision
from mlx_vlm.utils import prepare_inputs, should_add_special_tokens
from PIL.Image import Image

from tests.models.running import greedy, prefill
from tests.tiny_vlms import VLM_NAMES, picture
from vllm_mlx.engine.request import Prompt, VideoFrames
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models import loader
from vllm_mlx.models.families.llava_next import layout, pack

NUM_TOKENS = 16


def rendered(loaded: Any, num_images: int) -> str:
    content: list[dict[str, str]] = [{"type": "text", "text": "Look: "}]
    for _ in range(num_images):
        content += [{"type": "image"}, {"type": "text", "text": " and "}]
    content.append({"type": "text", "text": "what is it?"})
    messages = [{"role": "user", "content": content}]
    text: str = loaded.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return text


def mlx_vlm_greedy(folder: Path, inputs: dict[str, Any], num_tokens: int) -> list[int]:
    """What mlx-vlm's single-request generation answers to these inputs."""
    model = mlx_vlm.utils.load_model(folder)
    rest = {k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values", "attention_mask")}
    steps = generate_step(
        inputs["input_ids"], model, inputs.get("pixel_values"), inputs.get("attention_mask"),
        max_tokens=num_tokens, temperature=0.0, **rest,
    )  # fmt: skip
    return [token for _, (token, _) in zip(range(num_tokens), steps, strict=False)]


def mlx_vlm_inputs(folder: Path, text: str, images: Sequence[Image], **extra: Any) -> dict[str, Any]:
    model, processor = mlx_vlm.load(str(folder))
    inputs: dict[str, Any] = prepare_inputs(
        processor,
        images=list(images) or None,
        prompts=text,
        image_token_index=getattr(model.config, "image_token_index", None),
        add_special_tokens=should_add_special_tokens(model.config.model_type, processor),
        **extra,
    )
    return inputs


@pytest.mark.parametrize("num_images", [0, 1, 2])
@pytest.mark.parametrize("name", [n for n in VLM_NAMES if n not in ("llava", "llava_next")])
def test_tokens_equal_mlx_vlm(name: str, num_images: int, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(name)
    loaded = loader.load(folder)
    assert loaded.media is not None and loaded.profile.is_multimodal and loaded.profile.runs_batched
    images = [picture(1, (128, 64)), picture(2, (64, 130))][:num_images]
    text = rendered(loaded, num_images)
    inputs = mlx_vlm_inputs(folder, text, images)
    token_ids, spans = loaded.media.expand(text, images)
    assert list(token_ids) == inputs["input_ids"][0].tolist()
    expected = mlx_vlm_greedy(folder, inputs, NUM_TOKENS)
    assert len(set(expected)) > 4, "weights so dull prove nothing"
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected
    assert greedy(loaded.model, token_ids, 4, media=spans, chunks=(1, 2)) == expected[:4]


def test_llava_tokens_equal_mlx_vlm_given_the_same_pixels(tiny_model: Callable[..., Path]) -> None:
    """mlx-vlm's LLaVA processor fails with transformers 5.15 and later, so the oracle is given our inputs."""
    folder = tiny_model("llava")
    loaded = loader.load(folder)
    assert loaded.media is not None
    token_ids, spans = loaded.media.expand(rendered(loaded, 1), [picture(1)])
    tokens = mx.array([token_ids])
    inputs = {
        "input_ids": tokens,
        "attention_mask": mx.ones_like(tokens),
        "pixel_values": mx.array(spans[0].inputs["pixel_values"]),
    }
    expected = mlx_vlm_greedy(folder, inputs, NUM_TOKENS)
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected


@pytest.mark.parametrize("size", [(96, 72), (40, 200), (56, 56), (300, 100)])
def test_llava_next_packs_tiles_as_llava_onevision_does(size: tuple[int, int], tiny_model: Callable[..., Path]) -> None:
    """mlx-vlm's own LLaVA-NeXT cannot be the oracle: its features do not fit the tokens its processor writes."""
    loaded = loader.load(tiny_model("llava_next"))
    assert loaded.media is not None
    pinpoints = loaded.processor.image_processor.image_grid_pinpoints
    at = layout(size[1], size[0], pinpoints, 56, 14)
    features = mx.random.normal((1 + at.tile_rows * at.tile_columns, 16, 8))
    newline = mx.random.normal((8,))
    config = SimpleNamespace(image_grid_pinpoints=pinpoints, vision_config=SimpleNamespace(image_size=56))
    onevision = SimpleNamespace(patches_per_side=4, config=config, image_newline=newline, max_num_patches=1000)
    (expected,) = OneVision.pack_image_features(onevision, [features], [(size[1], size[0])])
    packed = pack(features, at, newline)
    assert packed.shape[0] == at.num_tokens
    assert mx.array_equal(packed, expected)
    token_ids, (span,) = loaded.media.expand("<image>", [picture(1, size)])
    assert span.length == at.num_tokens == loaded.model.encode(span).embeddings.shape[0]
    assert (
        list(token_ids)
        == mlx_vlm_inputs(tiny_model("llava_next"), "<image>", [picture(1, size)])["input_ids"][0].tolist()
    )


@pytest.mark.parametrize("name", VLM_NAMES)
def test_another_picture_gives_another_answer(name: str, tiny_model: Callable[..., Path]) -> None:
    loaded = loader.load(tiny_model(name))
    assert loaded.media is not None
    answers = []
    for seed in (1, 2):
        token_ids, spans = loaded.media.expand(rendered(loaded, 1), [picture(seed)])
        answers.append(greedy(loaded.model, token_ids, NUM_TOKENS, media=spans))
    assert answers[0] != answers[1]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_video_tokens_equal_mlx_vlm(name: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(name)
    loaded = loader.load(folder)
    assert loaded.media is not None
    frames = [picture(seed, (64, 64)) for seed in range(4)]
    text = f"See <|vision_start|>{loaded.processor.video_token}<|vision_end|> move."
    token_ids, spans = loaded.media.expand(text, (), [VideoFrames(frames, [0.0, 0.5, 1.0, 1.5])])
    inputs = mlx_vlm_inputs(folder, text, (), videos=[frames], fps=2.0)
    assert list(token_ids) == inputs["input_ids"][0].tolist()
    assert [span.kind for span in spans] == ["video"]
    expected = mlx_vlm_greedy(folder, inputs, NUM_TOKENS)
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl", "qwen3_5_mm"])
def test_recomputing_generated_tokens_by_prefill_changes_nothing(name: str, tiny_model: Callable[..., Path]) -> None:
    """After a preemption, completion tokens are prefilled: their positions lie beyond the prompt."""
    loaded = loader.load(tiny_model(name))
    assert loaded.media is not None
    token_ids, spans = loaded.media.expand(rendered(loaded, 1), [picture(3)])
    expected = greedy(loaded.model, token_ids, NUM_TOKENS, media=spans)
    prompt = Prompt(token_ids, spans)
    state = loaded.model.prompt_state(prompt)
    features = {0: loaded.model.encode(spans[0])}
    cache = loaded.model.make_cache()
    longer = Prompt((*token_ids, *expected[:-1]), spans)
    at = prefill(loaded.model, longer, 0, len(longer) - 1, cache, state, features, (11,))
    logits = loaded.model.decode(mx.array([[longer.token_ids[-1]]]), [at], cache, [state])
    assert int(mx.argmax(logits).item()) == expected[-1]


def test_generation_leaves_no_position_state_on_the_model(tiny_model: Callable[..., Path]) -> None:
    """Two requests interleaved token by token answer as they do alone."""
    loaded = loader.load(tiny_model("qwen3_vl"))
    media = loaded.media
    assert media is not None
    prompts = [Prompt(*media.expand(rendered(loaded, n), [picture(i, (64 * n, 96)) for i in range(n)])) for n in (1, 2)]
    expected = [greedy(loaded.model, p.token_ids, NUM_TOKENS, media=p.media) for p in prompts]
    rows: list[Any] = []
    for p in prompts:
        state, cache = loaded.model.prompt_state(p), loaded.model.make_cache()
        features = {i: loaded.model.encode(s) for i, s in enumerate(p.media)}
        at = prefill(loaded.model, p, 0, len(p) - 1, cache, state, features, (9,))
        rows.append([p.token_ids[-1], at, cache, state, []])
    for _ in range(NUM_TOKENS):
        for row in rows:
            logits = loaded.model.decode(mx.array([[row[0]]]), [row[1]], row[2], [row[3]])
            row[0] = int(mx.argmax(logits).item())
            row[1] += 1
            row[4].append(row[0])
    assert [row[4] for row in rows] == expected


def test_a_multimodal_checkpoint_serves_text_without_its_tower(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("qwen3_vl")
    as_text = loader.load(folder, mllm=False)
    assert as_text.media is None and not as_text.profile.is_multimodal
    token_ids = as_text.tokenizer.encode("The quick brown fox")
    with_tower = loader.load(folder)
    assert greedy(as_text.model, token_ids, 8) == greedy(with_tower.model, token_ids, 8)


def test_demanding_a_tower_of_a_text_model_is_refused(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(ModelLoadError, match="without --mllm"):
        loader.load(tiny_model("qwen3"), mllm=True)
