"""Positions in three axes (time, height, width) for models with multimodal RoPE: the Qwen-VL line and its relatives.

A text token advances all three axes together; an image's tokens share one start and spread over its grid, so the next
text token starts after the largest axis, not after the token count. `MRopeState` keeps that per prompt, on the host.

    tokens      t  t  i  i  i  i  t          grid 1 x 2 x 2
    time        0  1  2  2  2  2  4
    height      0  1  2  2  3  3  4          delta = 5 - 7 = -2, added to the position of every token after the prompt
    width       0  1  2  3  2  3  4
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from .base import Features, Prompt
from .family import Family, Overlap
from .span import MediaSpan

GRIDS = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True)
class MRopeState:
    """`positions` int32 [3, prompt length]; a later token at absolute position p has p + `delta` on every axis."""

    positions: np.ndarray
    delta: int

    def slice(self, start: int, length: int) -> np.ndarray:
        """Positions [3, length] of tokens start .. start + length, which may lie beyond the prompt."""
        known = self.positions[:, start : start + length]
        missing = length - known.shape[1]
        if missing == 0:
            return known
        first = start + known.shape[1] + self.delta
        later = np.broadcast_to(np.arange(first, first + missing, dtype=np.int32), (3, missing))
        return np.concatenate([known, later], axis=1)


def mrope_state(
    token_ids: Sequence[int], media: Sequence[MediaSpan], media_token_ids: frozenset[int], merge_size: int
) -> MRopeState:
    """Positions of a prompt. Media tokens of a span may stand in several runs, which share its frames evenly."""
    positions = np.empty((3, len(token_ids)), dtype=np.int32)
    at, next_position = 0, 0

    def text_until(end: int) -> None:
        nonlocal at, next_position
        positions[:, at:end] = np.arange(next_position, next_position + end - at, dtype=np.int32)
        next_position += end - at
        at = end

    for span in media:
        grid = next((span.inputs[name] for name in GRIDS if name in span.inputs), None)
        if grid is None:
            continue
        t, h, w = (int(n) for n in np.asarray(grid).reshape(-1, 3)[0])
        h, w = h // merge_size, w // merge_size
        runs = _runs(token_ids, span, media_token_ids)
        frames = t // len(runs)
        for begin, end in runs:
            if end - begin != frames * h * w:
                raise ValueError(f"a media run of {end - begin} tokens does not hold a grid of {frames}x{h}x{w}")
            text_until(begin)
            axes = np.indices((frames, h, w), dtype=np.int32).reshape(3, -1)
            positions[:, begin:end] = axes + next_position
            next_position += max(frames, h, w)
            at = end
    text_until(len(token_ids))
    return MRopeState(positions=positions, delta=next_position - len(token_ids))


def _runs(token_ids: Sequence[int], span: MediaSpan, media_token_ids: frozenset[int]) -> list[tuple[int, int]]:
    """Stretches of media tokens in a span: one for an image, one a frame group where a model writes times between."""
    runs: list[tuple[int, int]] = []
    begin: int | None = None
    for i in range(span.start, span.end + 1):
        is_media = i < span.end and token_ids[i] in media_token_ids
        if is_media and begin is None:
            begin = i
        elif not is_media and begin is not None:
            runs.append((begin, i))
            begin = None
    return runs


class ThreeAxisFamily(Family):
    """Explicit position ids at every call, so that the model keeps none."""

    def prefill_inputs(
        self, start: int, length: int, positions: Any | None, overlaps: Sequence[Overlap], dtype: mx.Dtype
    ) -> dict[str, Any]:
        if positions is None:
            axes = np.broadcast_to(np.arange(start, start + length, dtype=np.int32), (3, length))
        else:
            axes = positions.slice(start, length)
        return {"position_ids": mx.array(axes)[:, None, :]}

    def decode_inputs(self, counts: Sequence[int], positions: Sequence[Any | None]) -> dict[str, Any]:
        row = [n + (p.delta if p is not None else 0) for n, p in zip(counts, positions, strict=True)]
        return {"position_ids": mx.broadcast_to(mx.array(row, dtype=mx.int32)[None, :, None], (3, len(row), 1))}


class MRopeFamily(ThreeAxisFamily):
    """Vision tower over patches with a grid, features merged by position."""

    # Features of some layers of the tower are added after the first layers of the language model.
    has_deepstack = False

    @property
    def merge_size(self) -> int:
        return int(self.config["vision_config"].get("spatial_merge_size", 2))

    def encode(self, model: Any, span: MediaSpan) -> Features:
        kind = "video" if "pixel_values_videos" in span.inputs else "image"
        pixels = span.inputs["pixel_values_videos" if kind == "video" else "pixel_values"]
        grid = mx.array(np.asarray(span.inputs[f"{kind}_grid_thw"]))
        dtype = model.vision_tower.patch_embed.proj.weight.dtype
        out = model.vision_tower(mx.array(pixels).astype(dtype), grid)
        embeddings, deepstack = out if isinstance(out, tuple) else (out, ())
        tokens = np.asarray(span.inputs["input_ids"])
        if embeddings.shape[0] == span.length:
            return Features(embeddings, tuple(deepstack) if self.has_deepstack else ())
        # Times stand between the frames: text embeddings there, and nothing for the deeper layers to add.
        at = mx.array(np.flatnonzero(np.isin(tokens, list(self.media_token_ids(kind)))))
        text, _ = self.embed(model, mx.array(tokens)[None])
        merged = mx.array(text[0])
        merged[at] = embeddings.astype(merged.dtype)
        deeper = []
        for layer in deepstack if self.has_deepstack else ():
            spread = mx.zeros((span.length, layer.shape[-1]), layer.dtype)
            spread[at] = layer
            deeper.append(spread)
        return Features(merged, tuple(deeper))

    def embed(self, model: Any, tokens: mx.array) -> tuple[mx.array, dict[str, Any]]:
        return model.language_model.model.embed_tokens(tokens), {}

    def positions(self, model: Any, prompt: Prompt) -> MRopeState:
        media_ids = frozenset().union(*(self.media_token_ids(kind) for kind in self.placeholders))
        return mrope_state(prompt.token_ids, prompt.media, media_ids, self.merge_size)

    def prefill_inputs(
        self, start: int, length: int, positions: Any | None, overlaps: Sequence[Overlap], dtype: mx.Dtype
    ) -> dict[str, Any]:
        inputs = super().prefill_inputs(start, length, positions, overlaps, dtype)
        if self.has_deepstack and overlaps and overlaps[0].features.deepstack:
            mask = np.zeros((1, length), dtype=bool)
            for o in overlaps:
                mask[0, o.at : o.at + o.n] = True
            depth = len(overlaps[0].features.deepstack)
            inputs["visual_pos_masks"] = mx.array(mask)
            inputs["deepstack_visual_embeds"] = [
                mx.concatenate([o.features.deepstack[i][o.first : o.first + o.n] for o in overlaps]).astype(dtype)
                for i in range(depth)
            ]
        return inputs
