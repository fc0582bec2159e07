"""LLaVA 1.5: one square crop, one run of tokens.

The image processor is called directly: through mlx-vlm's LlavaProcessor it receives tokenizer options, which
transformers 5.15 and later refuse.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(Family):
    def prepare_image(self, image: Image) -> Prepared:
        out = self.processor.image_processor(images=[image], return_tensors="np")
        pixels = np.asarray(out["pixel_values"])
        n = self.num_tokens(*pixels.shape[-2:])
        return Prepared(text=self.image_token * n, num_media_tokens=n, inputs={"pixel_values": pixels})

    def num_tokens(self, height: int, width: int) -> int:
        """Patches, without the class token unless the config asks for all of the tower's output."""
        patch = int(self.config["vision_config"].get("patch_size", 14))
        strategy = self.config.get("vision_feature_select_strategy", "default")
        return (height // patch) * (width // patch) + (0 if strategy == "default" else 1)
