"""Phi-3 and 3.5 Vision: pictures are numbered in the text, and ids below zero stand for their tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..whole_family import WholeFamily, numbered

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(WholeFamily):
    reason = "its own code writes the pictures into the embeddings of a whole prompt"
    placeholder = "<image>"

    def process(self, text: str, images: list[Image]) -> Mapping[str, Any]:
        return super().process(numbered(text, self.placeholder), images)
