"""Three-axis positions on the host equal those that mlx-vlm's models compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_vlm
import numpy as np
import pytest

from tests.tiny_vlms import picture
from vllm_mlx.models import loader
from vllm_mlx.models.mrope import MRopeState, mrope_state
from vllm_mlx.models.span import MediaSpan, VideoFrames

PAD = 9


def image_span(start: int, grid: tuple[int, int, int]) -> MediaSpan:
    t, h, w = grid
    inputs = {"image_grid_thw": np.array([grid])}
    return MediaSpan(start, t * h * w // 4, "image", b"x", inputs)


def test_the_picture_in_the_docstring() -> None:
    token_ids = [1, 1, PAD, PAD, PAD, PAD, 1]
    state = mrope_state(token_ids, [image_span(2, (1, 4, 4))], frozenset({PAD}), 2)
    assert state.positions.tolist() == [[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]]
    assert state.delta == -2


def test_positions_beyond_the_prompt_go_on_in_step() -> None:
    state = MRopeState(np.array([[0, 1, 2]] * 3, dtype=np.int32), delta=-1)
    assert state.slice(1, 2).tolist() == [[1, 2]] * 3
    assert state.slice(2, 3).tolist() == [[2, 2, 3]] * 3
    assert state.slice(5, 2).tolist() == [[4, 5]] * 3


def test_a_span_whose_tokens_do_not_fit_its_grid_is_an_error() -> None:
    with pytest.raises(ValueError, match="does not hold a grid"):
        mrope_state([1, PAD, PAD], [MediaSpan(1, 2, "image", b"x", {"image_grid_thw": np.array([[1, 4, 4]])})],
                    frozenset({PAD}), 2)  # fmt: skip


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5_mm"])
def test_positions_equal_those_of_mlx_vlm(name: str, tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model(name)
    loaded = loader.load(folder)
    assert loaded.media is not None
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    clip = "<|vision_start|><|video_pad|><|vision_end|>"
    frames = VideoFrames([picture(i, (64, 96)) for i in range(6)], [0.5 * i for i in range(6)])
    token_ids, spans = loaded.media.expand(
        f"First {image} then {clip} and {image}{image}.",
        [picture(1), picture(2, (128, 64)), picture(3, (64, 130))],
        [frames],
    )
    merge_size = loaded.processor.image_processor.merge_size
    ids = frozenset({loaded.processor.image_token_id, loaded.processor.video_token_id})
    ours = mrope_state(token_ids, spans, ids, merge_size)
    model, _ = mlx_vlm.load(str(folder))
    grids = {
        key: mx.array(np.concatenate([s.inputs[key] for s in spans if key in s.inputs]))
        for key in ("image_grid_thw", "video_grid_thw")
    }
    theirs, delta = model.language_model.get_rope_index(mx.array([token_ids]), **grids)
    assert ours.positions.tolist() == np.array(theirs)[:, 0].tolist()
    assert ours.delta == int(delta.item())
