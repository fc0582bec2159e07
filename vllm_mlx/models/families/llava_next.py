"""LLaVA-NeXT (1.6): the whole picture, then its tiles joined again, cropped to the picture, a newline after each row.

The packing is done here: mlx-vlm (0.7.10) gives every tile, padding included, to prompts whose processor counted
cropped tokens, so that features and tokens do not meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from transformers.image_processing_utils import select_best_resolution

from ..base import Features
from ..family import Prepared
from ..span import MediaSpan
from .llava import ModelFamily as LlavaFamily

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Layout:
    """Patches of a picture: `side` squared for the whole, then a grid of tiles of which rows and columns are kept."""

    side: int
    tile_rows: int
    tile_columns: int
    rows: slice
    columns: slice

    @property
    def num_tokens(self) -> int:
        rows = self.rows.stop - self.rows.start
        return self.side**2 + rows * (self.columns.stop - self.columns.start) + rows


def layout(height: int, width: int, pinpoints: list[list[int]], tile: int, patch: int) -> Layout:
    """Where the picture lies in its tiles: they are filled out with padding on two sides, which is cut off again."""
    best_height, best_width = select_best_resolution((height, width), pinpoints)
    side = tile // patch
    tile_rows, tile_columns = best_height // tile, best_width // tile
    full_rows, full_columns = tile_rows * side, tile_columns * side
    cut_rows = cut_columns = 0
    if width / height > full_columns / full_rows:
        cut_rows = (full_rows - int(round(height * (full_columns / width), 7))) // 2
    else:
        cut_columns = (full_columns - int(round(width * (full_rows / height), 7))) // 2
    return Layout(
        side=side,
        tile_rows=tile_rows,
        tile_columns=tile_columns,
        rows=slice(cut_rows, full_rows - cut_rows),
        columns=slice(cut_columns, full_columns - cut_columns),
    )


class ModelFamily(LlavaFamily):
    def prepare_image(self, image: Image) -> Prepared:
        out = self.processor.image_processor(images=[image], return_tensors="np")
        size = np.asarray(out["image_sizes"]).reshape(-1, 2)
        n = self._layout(size).num_tokens
        inputs = {"pixel_values": np.asarray(out["pixel_values"])[0], "image_sizes": size}
        return Prepared(text=self.image_token * n, num_media_tokens=n, inputs=inputs)

    def _layout(self, size: np.ndarray) -> Layout:
        vision = self.config["vision_config"]
        pinpoints = [list(p) for p in self.processor.image_processor.image_grid_pinpoints]
        height, width = (int(n) for n in size[0])
        return layout(height, width, pinpoints, int(vision.get("image_size", 336)), int(vision.get("patch_size", 14)))

    def encode(self, model: Any, span: MediaSpan) -> Features:
        at = self._layout(span.inputs["image_sizes"])
        pixels = mx.array(span.inputs["pixel_values"])[: 1 + at.tile_rows * at.tile_columns]
        *_, hidden = model.vision_tower(pixels.transpose(0, 2, 3, 1), output_hidden_states=True)
        selected = hidden[model.vision_feature_layer]
        if model.vision_feature_select_strategy == "default":
            selected = selected[:, 1:]
        return Features(pack(model.multi_modal_projector(selected), at, model.image_newline))


def pack(features: mx.array, at: Layout, newline: mx.array) -> mx.array:
    """[1 + tiles, side * side, hidden] to the tokens of the picture [num_tokens, hidden]."""
    whole, tiles = features[0], features[1:]
    width = features.shape[-1]
    grid = tiles.reshape(at.tile_rows, at.tile_columns, at.side, at.side, width).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(at.tile_rows * at.side, at.tile_columns * at.side, width)[at.rows, at.columns]
    ends = mx.broadcast_to(newline.astype(grid.dtype), (grid.shape[0], 1, width))
    return mx.concatenate([whole, mx.concatenate([grid, ends], axis=1).reshape(-1, width)])
