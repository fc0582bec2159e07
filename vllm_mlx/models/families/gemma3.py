"""Gemma 3: every image is the same number of soft tokens, set off by blank lines.

mlx-vlm lets image tokens see only what is before them, as text does; so do we, hence spans may be split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(Family):
    @property
    def placeholders(self) -> Mapping[str, str]:
        return {"image": self.processor.boi_token}

    def media_token_ids(self, kind: str) -> frozenset[int]:
        return frozenset({self.processor.image_token_id})

    def prepare_image(self, image: Image) -> Prepared:
        out = self.processor.image_processor(images=[image], return_tensors="np")
        return Prepared(
            text=self.processor.full_image_sequence,
            num_media_tokens=self.processor.image_seq_length,
            inputs={"pixel_values": np.asarray(out["pixel_values"])},
        )
