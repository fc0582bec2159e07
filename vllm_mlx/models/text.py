"""Text models: mlx-lm's model classes behind `LanguageModel`. MLX thread only.

All of them take `(tokens, cache=...)` and find positions in the cache, so the adapter is thin; the one question is
whether their caches and their code hold several rows at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..errors import EngineError
from .adapters import AdapterBank
from .base import Features, Prompt
from .cache_view import GroupsQueries
from .fused import fuse_layers, unfuse_layers
from .grouped import RowWindow, group_mixers, ungroup_mixers
from .joint import by_group
from .profile import ModelProfile
from .span import MediaSpan

# Cache classes whose contents can stand in rows of one batch.
BATCHABLE_CACHES = frozenset({"KVCache", "RotatingKVCache", "ArraysCache"})

# Code that does host arithmetic on `cache.offset`, or mixes rows: one row at a time, whatever the cache class.
SINGLE_ROW_TYPES: Mapping[str, str] = {
    "afm7": "its last layers take a query's position from the length of the whole batch",
    "gpt_bigcode": "its position ids are built on the host from one offset",
    "phi3small": "its block-sparse attention places queries by the length of the whole batch",
    "minimax_m3_vl": "its sparse attention chooses key blocks by the length of the whole batch",
}

# Attention that computes scores by groups of query heads, with masks that fit a single row only.
GROUPED_QUERY_TYPES = frozenset({"gemma2"})


class TextModel:
    """`LanguageModel` over an mlx-lm model."""

    atomic_spans = False

    def __init__(self, model: Any, profile: ModelProfile) -> None:
        self._model = model
        self._groups_queries = profile.model_type in GROUPED_QUERY_TYPES
        reason = why_single_row(self.make_cache(), profile.model_type)
        if reason:
            profile = replace(profile, runs_batched=False, notes=(*profile.notes, reason))
        self.profile = profile
        window = RowWindow()
        self.can_group = profile.runs_batched and group_mixers(model, window, by_group)
        if self.can_group:
            fuse_layers(model, window)
        self.adapters = AdapterBank(model, window)

    def ungroup(self) -> None:
        unfuse_layers(self._model)
        ungroup_mixers(self._model)
        self.can_group = False

    def make_cache(self) -> list[Any]:
        return list(make_prompt_cache(self._model))

    def encode(self, span: MediaSpan) -> Features:
        raise EngineError(f"{self.profile.name} is served as a text model and cannot take {span.kind} input.")

    def prompt_state(self, prompt: Prompt) -> None:
        return None

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> mx.array:
        logits: mx.array = self._model(tokens, cache=cache)
        return logits

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        if self._groups_queries and len(positions) > 1:
            cache = [GroupsQueries(entry) for entry in cache]
        logits: mx.array = self._model(tokens, cache=cache)
        return logits[:, -1, :]

    def close(self) -> None:
        self._model = None
        self.adapters.close()


def why_single_row(cache: Sequence[Any], model_type: str) -> str | None:
    """A sentence when the model can only run one row at a time, else None."""
    if model_type in SINGLE_ROW_TYPES:
        return f"{model_type} runs one request at a time: {SINGLE_ROW_TYPES[model_type]}"
    for entry in cache:
        parts = getattr(entry, "caches", None)
        for part in parts if parts is not None else (entry,):
            kind = type(part).__name__
            if kind not in BATCHABLE_CACHES:
                return f"{model_type} runs one request at a time: rows of a {kind} cannot be batched"
    return None
