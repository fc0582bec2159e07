"""Gemma 3n: like any other, but that the end-of-image token too has its embedding from the vision part.

The token lies beyond the text vocabulary; inside the span it is embedded by the merging code, outside it would not be.
"""

from __future__ import annotations

from ..generic import GenericFamily


class ModelFamily(GenericFamily):
    def media_token_ids(self, kind: str) -> frozenset[int]:
        end = self.tokenizer.convert_tokens_to_ids(self.tokenizer.eoi_token)
        return super().media_token_ids(kind) | {int(end)}
