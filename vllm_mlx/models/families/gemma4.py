"""Gemma 4: pictures keep their shape, within a budget of soft tokens, which may see each other in both directions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(Family):
    @property
    def atomic_spans(self) -> bool:
        return bool(self.config.get("text_config", {}).get("use_bidirectional_attention") == "vision")

    def media_token_ids(self, kind: str) -> frozenset[int]:
        return frozenset({int(self.processor.image_token_id)})

    def prepare_image(self, image: Image) -> Prepared:
        out, num_tokens = self.processor.image_processor([image])
        n = int(num_tokens[0])
        return Prepared(
            text=f"{self.processor.boi_token}{self.image_token * n}{self.processor.eoi_token}",
            num_media_tokens=n,
            inputs={"pixel_values": np.asarray(out["pixel_values"], dtype=np.float32)},
        )
