"""From text and pictures to token ids and spans: the part of multimodal models that runs on worker threads."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.tiny_vlms import picture
from vllm_mlx.engine.request import Prompt, VideoFrames
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.models import loader
from vllm_mlx.models.family import find_family
from vllm_mlx.models.media import MediaProcessor, content_hash
from vllm_mlx.models.profile import read_json

IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def qwen(tiny_model: Callable[..., Path]) -> Any:
    return loader.load(tiny_model("qwen3_vl"))


@pytest.fixture(scope="module")
def media(qwen: Any) -> MediaProcessor:
    assert isinstance(qwen.media, MediaProcessor)
    return qwen.media


def test_text_alone_is_tokenised_as_ever(qwen: Any, media: MediaProcessor) -> None:
    token_ids, spans = media.expand("The quick brown fox.")
    assert list(token_ids) == qwen.tokenizer.encode("The quick brown fox.")
    assert spans == ()


def test_spans_lie_where_the_placeholders_were(qwen: Any, media: MediaProcessor) -> None:
    token_ids, spans = media.expand(f"a{IMAGE}b{IMAGE}", [picture(1), picture(2, (128, 64))])
    pad = qwen.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    for span in spans:
        assert set(token_ids[span.start : span.end]) == {pad}
        assert pad not in (token_ids[span.start - 1], token_ids[span.end])
        assert span.length == int(span.inputs["image_grid_thw"].prod()) // 4
    assert token_ids.count(pad) == sum(span.length for span in spans)


def test_neighbouring_pictures_get_spans_of_their_own(tiny_model: Callable[..., Path]) -> None:
    """LLaVA writes nothing between two pictures, so their tokens form one run."""
    media = loader.load(tiny_model("llava")).media
    assert media is not None
    _, (first, second) = media.expand("<image><image>", [picture(1), picture(2)])
    assert first.end == second.start and first.content_hash != second.content_hash


def test_equal_pictures_have_equal_hashes_and_others_never(media: MediaProcessor) -> None:
    def hash_of(image: Any) -> bytes:
        span = media.expand(IMAGE, [image])[1][0]
        return span.content_hash

    original = picture(1)
    assert hash_of(original) == hash_of(picture(1))
    for x, y in ((0, 0), (95, 71)):
        changed = original.copy()
        red, green, blue = changed.getpixel((x, y))
        changed.putpixel((x, y), (red ^ 64, green, blue))
        assert hash_of(changed) != hash_of(original)


def test_prompts_with_different_pictures_share_no_cache_key_past_the_first(media: MediaProcessor) -> None:
    one, two = (Prompt(*media.expand(f"a{IMAGE}b", [picture(seed)])) for seed in (1, 2))
    start = one.media[0].start
    assert one.token_ids == two.token_ids
    assert one.cache_key[:start] == two.cache_key[:start]
    assert all(a != b for a, b in zip(one.cache_key[start : one.media[0].end], two.cache_key[start:], strict=False))


def test_the_hash_covers_names_shapes_dtypes_and_bytes() -> None:
    base = {"pixel_values": np.zeros((2, 3), np.float32), "grid": np.array([1, 2])}
    hashes = {
        content_hash(base),
        content_hash({**base, "pixel_values": np.zeros((3, 2), np.float32)}),
        content_hash({**base, "pixel_values": np.zeros((2, 3), np.int32)}),
        content_hash({**base, "grid": np.array([2, 1])}),
        content_hash({"pixels": base["pixel_values"], "grid": base["grid"]}),
        content_hash({"pixel_values": base["pixel_values"]}),
    }
    assert len(hashes) == 6


def test_a_placeholder_in_somebodys_text_is_refused(media: MediaProcessor) -> None:
    with pytest.raises(InvalidRequest, match="leave it out") as caught:
        media.expand(f"what does <|image_pad|> mean? {IMAGE}", [picture(1)])
    assert caught.value.param == "messages"


def test_a_template_that_drops_pictures_is_named(media: MediaProcessor) -> None:
    with pytest.raises(InvalidRequest, match="wrote 0 of the 1 images"):
        media.expand("no placeholder", [picture(1)])


def test_video_for_a_model_without_is_refused(tiny_model: Callable[..., Path]) -> None:
    loaded = loader.load(tiny_model("gemma3"))
    assert loaded.media is not None and loaded.profile.modalities == {"text", "image"}
    with pytest.raises(InvalidRequest, match="does not take videos"):
        loaded.media.expand("x", (), [VideoFrames([picture(1)], [0.0])])


def test_a_clip_is_written_with_its_times(qwen: Any, media: MediaProcessor) -> None:
    clip = VideoFrames([picture(i, (64, 64)) for i in range(4)], [0.0, 2.0, 4.0, 6.0])
    token_ids, (span,) = media.expand("<|vision_start|><|video_pad|><|vision_end|>", (), [clip])
    text = qwen.tokenizer.decode(token_ids)
    assert "<1.0 seconds>" in text and "<5.0 seconds>" in text
    assert span.kind == "video" and span.end < len(token_ids)


def test_clips_at_another_pace_are_other_content(media: MediaProcessor) -> None:
    frames = [picture(i, (64, 64)) for i in range(4)]
    keys = set()
    for pace in (1.0, 2.0):
        clip = VideoFrames(frames, [i * pace for i in range(4)])
        keys.add(media.expand("<|vision_start|><|video_pad|><|vision_end|>", (), [clip])[1][0].content_hash)
    assert len(keys) == 2


def test_a_beginning_token_is_added_once(tiny_model: Callable[..., Path]) -> None:
    loaded = loader.load(tiny_model("gemma3"))
    assert loaded.media is not None
    bos = loaded.tokenizer.bos_token_id
    token_ids, _ = loaded.media.expand("<bos>hello")
    assert token_ids.count(bos) == 1


def test_pictures_seen_before_are_not_processed_again(qwen: Any) -> None:
    calls = []
    family_class = find_family("qwen3_vl")
    assert family_class is not None

    class Counting(family_class):  # type: ignore[misc, valid-type]
        def prepare_image(self, image: Any) -> Any:
            calls.append(image)
            return super().prepare_image(image)

    config = read_json(qwen.profile.path / "config.json")
    counting = Counting(qwen.profile, config, qwen.processor, qwen.tokenizer)
    media = MediaProcessor(counting, qwen.tokenizer, kept_bytes=1 << 20)
    for _ in range(3):
        media.expand(f"{IMAGE}{IMAGE}", [picture(1), picture(2)])
    assert len(calls) == 2
    forgetful = MediaProcessor(counting, qwen.tokenizer, kept_bytes=0)
    for _ in range(2):
        forgetful.expand(IMAGE, [picture(1)])
    assert len(calls) == 4


def test_many_threads_may_expand_at_once(media: MediaProcessor) -> None:
    def work(seed: int) -> tuple[bytes, int]:
        token_ids, (span,) = media.expand(f"{seed % 4}{IMAGE}", [picture(seed % 4)])
        return span.content_hash, len(token_ids)

    alone = [work(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, range(40)))
    assert together == [alone[seed % 4] for seed in range(40)]
