"""Florence-2: an encoder reads the picture and the words; the answer is a decoder's, which starts from nothing.

The words may be one of its tasks (`<CAPTION>`, `<OD>`), which its processor knows. It knows no turns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..whole_family import INSTRUCTIONS, WholeFamily, WholePrompt

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(WholeFamily):
    reason = "it is an encoder with a decoder, and only the encoder sees the prompt"
    max_images = 1
    template = INSTRUCTIONS
    placeholder = "<image>"

    def read_images(self, text: str, images: Sequence[Image]) -> WholePrompt:
        """Its processor puts the picture first and wants the words alone."""
        return self.counted(self.process(text.replace(self.placeholder, ""), list(images)))
