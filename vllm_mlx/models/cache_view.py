"""Caches shown to a model with another mask than their own, for the length of one call. MLX thread only.

A view holds no keys: whatever else the model reads or sets goes to the cache behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np


class CacheView:
    """Everything as in the cache behind; subclasses change the mask."""

    def __init__(self, cache: Any) -> None:
        object.__setattr__(self, "_cache", cache)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._cache, name, value)


class SeesWholeSpans(CacheView):
    """In a prefill chunk, tokens of a span also see the later ones of it. `spans`: (start, length) within the chunk."""

    def __init__(self, cache: Any, spans: Sequence[tuple[int, int]]) -> None:
        super().__init__(cache)
        object.__setattr__(self, "_spans", spans)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        mask = self._cache.make_mask(N, return_array=True, window_size=window_size)
        if isinstance(mask, str):
            mask = mx.tri(N, dtype=mx.bool_)
        seen = np.zeros((N, mask.shape[-1]), dtype=bool)
        first = mask.shape[-1] - N  # the chunk's own keys are the last
        for start, length in self._spans:
            seen[start : start + length, first + start : first + start + length] = True
        return mask | mx.array(seen)


class GroupsQueries(CacheView):
    """For attention over scores [R, key heads, queries per key head, L, length]: batch masks with an axis more."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        mask = self._cache.make_mask(N, return_array=return_array, window_size=window_size)
        return mask[:, :, None] if isinstance(mask, mx.array) and mask.ndim == 4 else mask
