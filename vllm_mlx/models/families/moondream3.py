"""Moondream 3: the picture and the beginning token see each other in both directions; questions have a form.

mlx-vlm's generator (0.7.10) leaves out the mask that its model makes for that; here the model is given it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.moondream3.processing_moondream3 import ANSWER_ID, Moondream3Processor

from ...errors import ModelLoadError
from ..json_file import read_json
from ..profile import ModelProfile
from ..stack import load_tokenizer
from ..whole_family import INSTRUCTIONS, WholeFamily, WholePrompt

if TYPE_CHECKING:
    from PIL.Image import Image

_CROPS = ("crop_size", "max_crops", "overlap_margin")


class ModelFamily(WholeFamily):
    reason = "its pictures are read in both directions"
    max_images = 1
    template = INSTRUCTIONS
    placeholder = "<image>"

    @classmethod
    def load_processor(cls, profile: ModelProfile, *, trust_remote_code: bool) -> Any:
        """Made here: mlx-vlm's own loader would fetch a tokenizer from the hub, with that repository's code."""
        tokenizer = load_tokenizer(profile, trust_remote_code=False)
        if tokenizer.convert_ids_to_tokens(0) != "<|endoftext|>":
            raise ModelLoadError(
                f"{profile.name} holds a tokenizer that its model does not use; put tokenizer.json and "
                "tokenizer_config.json of moondream/starmie-v1 into its folder."
            )
        crops = dict(read_json(profile.path / "config.json").get("vision_config") or {})
        crops |= read_json(profile.path / "processor_config.json", required=False)
        return Moondream3Processor(tokenizer, **{name: int(crops[name]) for name in _CROPS if name in crops})

    def read_text(self, text: str) -> WholePrompt:
        words = self.tokenizer.encode(f"\n\nQuestion: {text}\n\nAnswer: ", add_special_tokens=False)
        return WholePrompt((self.tokenizer.bos_token_id or 0, *words, ANSWER_ID))

    def read_images(self, text: str, images: Sequence[Image]) -> WholePrompt:
        """Its processor puts the picture first and wants the words alone."""
        return self.counted(self.process(text.replace(self.placeholder, ""), list(images)))

    def keywords(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """How many crops there are, and how they lie, is read by the host."""
        return (
            {
                "num_crops": inputs["num_crops"].tolist(),
                "crop_layouts": [tuple(layout) for layout in inputs["crop_layouts"].tolist()],
            }
            if inputs
            else {}
        )

    def renamed(self, extra: dict[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
        mask: mx.array | None = extra.pop("attention_mask_4d", None)
        return extra if mask is None else {**extra, "mask": mask.astype(dtype)}
