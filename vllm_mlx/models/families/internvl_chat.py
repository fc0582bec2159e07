"""InternVL: a picture is cut into up to a dozen square tiles and a thumbnail, all in one run of context tokens.

Tiles are cut by mlx-vlm's function and normalised here: its processor computes with MLX, and workers do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from mlx_vlm.models.internvl_chat.processor import dynamic_preprocess

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image

START, CONTEXT, END = "<img>", "<IMG_CONTEXT>", "</img>"


class ModelFamily(Family):
    @property
    def placeholders(self) -> Mapping[str, str]:
        template = self.profile.chat_template or ""
        return {"image": CONTEXT if CONTEXT in template and "<image>" not in template else "<image>"}

    def media_token_ids(self, kind: str) -> frozenset[int]:
        return frozenset({int(self.tokenizer.convert_tokens_to_ids(CONTEXT))})

    def prepare_image(self, image: Image) -> Prepared:
        processor = self.processor.image_processor
        tiles = dynamic_preprocess(
            image,
            min_num=processor.dynamic_min_num,
            max_num=processor.dynamic_max_num,
            image_size=processor.size,
            use_thumbnail=processor.dynamic_use_thumbnail,
        )
        mean = np.asarray(processor.image_mean, dtype=np.float32)
        std = np.asarray(processor.image_std, dtype=np.float32)
        pixels = np.stack([(np.asarray(tile, dtype=np.float32) / 255 - mean) / std for tile in tiles])
        n = len(tiles) * int(self.processor.num_image_token)
        return Prepared(
            text=f"{START}{CONTEXT * n}{END}",
            num_media_tokens=n,
            inputs={"pixel_values": np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))},
        )
