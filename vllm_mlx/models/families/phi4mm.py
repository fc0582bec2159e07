"""Phi-4 Multimodal: one id below zero stands for a picture, however many tokens that has.

Sounds are not taken here. Its text layers carry the vision adapter at all times, as mlx-vlm loads them: another one
would be switched on for the whole model by what a single prompt holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..whole_family import WholeFamily, WholePrompt, numbered

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(WholeFamily):
    reason = "its own code writes the pictures into the embeddings of a whole prompt"
    placeholder = "<image>"

    def read_images(self, text: str, images: Sequence[Image]) -> WholePrompt:
        out = self.process(numbered(text, self.placeholder), list(images))
        sizes = np.asarray(out["spatial_shapes"]).reshape(len(images), 2)
        return self.counted(out, [int(rows) * int(columns) for rows, columns in sizes])
