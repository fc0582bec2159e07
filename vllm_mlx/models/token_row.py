"""One text, or one pair of texts, as an encoder reads it: plain data that crosses from workers to the MLX thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenRow:
    """`type_ids` tells the two texts of a pair apart, for the models (BERT) that look at it."""

    token_ids: tuple[int, ...]
    type_ids: tuple[int, ...] | None = None

    def __len__(self) -> int:
        return len(self.token_ids)
