"""Phi-4 with a SigLIP tower: one id below zero stands for a picture, however many tokens that has.

mlx-vlm (0.7.10) asks transformers for an image processor that needs torch, for towers that keep a picture's shape; the
one that does without is put in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from mlx_vlm.models.phi4_siglip.processing_phi4_siglip import Phi4SigLipProcessor
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from ..json_file import read_json
from ..profile import ModelProfile
from ..stack import load_tokenizer
from ..whole_family import WholeFamily, WholePrompt

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(WholeFamily):
    reason = "its own code writes the pictures into the embeddings of a whole prompt"
    placeholder = "<image>"

    @classmethod
    def load_processor(cls, profile: ModelProfile, *, trust_remote_code: bool) -> Any:
        config = read_json(profile.path / "config.json")
        tower = str(config.get("mm_vision_tower") or "").lower()
        if "naflex" not in tower:
            return super().load_processor(profile, trust_remote_code=trust_remote_code)
        patch = (config.get("vision_config") or {}).get("patch_size") or (14 if "patch14" in tower else 16)
        half = [0.5, 0.5, 0.5]
        images = Siglip2ImageProcessorPil(
            patch_size=patch, max_num_patches=config.get("max_num_patches", 3600), image_mean=half, image_std=half
        )
        return Phi4SigLipProcessor(images, load_tokenizer(profile, trust_remote_code=False))

    def read_images(self, text: str, images: Sequence[Image]) -> WholePrompt:
        out = self.process(text, list(images))
        mask = out.get("pixel_attention_mask")
        if mask is not None:
            return self.counted(out, [int(n) for n in np.asarray(mask).reshape(len(images), -1).sum(-1)])
        tower = self.config.get("vision_config") or {}
        side = int(tower.get("image_size", 384)) // int(tower.get("patch_size", 16))
        return self.counted(out, [side * side] * len(images))
