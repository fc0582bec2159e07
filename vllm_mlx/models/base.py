"""The one face the engine sees of any model, text or multimodal, and what a model asks of the engine's caches.

MLX thread only. A model object holds weights and nothing of any sequence: position state (rope deltas and the like)
travels in `state`, keys and values in `cache`, so rows may join and leave at every step.

What a cache object must offer, one per layer, because the model code of mlx-lm and mlx-vlm uses it
(`tests/contract/test_cache_use.py` pins the list against the installed versions):

  every kind     truthy: a class with a `__len__` of 0 is taken for no cache. No attribute `bits` unless
                 `update_and_fetch` returns quantised triples (then `group_size` too).
  attention      `update_and_fetch(keys [R, H, L, Dk], values [R, H, L, Dv]) -> (keys, values)`; Dk and Dv may differ,
                 Dv may be 0. `offset`: host int for one row, int32 array [R] for a batch, read before the update by
                 each layer. `make_mask(N, return_array=False, window_size=None)`, asked once per kind before a step's
                 updates and used by all layers of the kind: "causal" (never when return_array), None (one row, N = 1),
                 or bool [R, 1, N, length]; length as `update_and_fetch` will return it.
                 Some read and set `keys` and `values` (to hang `mx.depends` on them); some call `keys_and_values()`.
                 Batch caches need a host int `_idx`: mlx-vlm would else read `offset` from the device. They must not
                 have `left_padding`, `extract` or `merge`: mlx-vlm's Qwen3.5 takes those for its own batches.
  recurrent      the stack's own ArraysCache (models test the class), rows along axis 0; `lengths` and `left_padding`
                 stay None. Slots are None before the first token, and such a row must not be joined to others.
  CacheList      `cache[i]` gives the part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from .adapters import AdapterBank
from .profile import ModelProfile
from .span import MediaSpan


class Prompt(Protocol):
    """What a model reads of the engine's prompt."""

    @property
    def token_ids(self) -> tuple[int, ...]: ...

    @property
    def media(self) -> tuple[MediaSpan, ...]: ...


@dataclass(frozen=True)
class Features:
    """Encoder output of one media span: `embeddings` [n, hidden] replace the span's n token embeddings.

    `deepstack` are further [n, hidden] arrays that some families add after their first layers.
    """

    embeddings: mx.array
    deepstack: tuple[mx.array, ...] = ()

    def arrays(self) -> tuple[mx.array, ...]:
        return (self.embeddings, *self.deepstack)

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays())


class LanguageModel(Protocol):
    """Weights and their forward pass. Nothing in here remembers a sequence.

    `atomic_spans`: a media span must be prefilled within one chunk (its tokens see each other in both directions).
    `can_group`: `decode` takes grouped caches (`grouped.py`); `ungroup` ends that, for models where it proves wrong.
    `adapters`: which adapter each row of the next call uses is said there, before the call.
    """

    profile: ModelProfile
    atomic_spans: bool
    can_group: bool
    adapters: AdapterBank

    def ungroup(self) -> None:
        """Put the plain modules back."""
        ...

    def make_cache(self) -> list[Any]:
        """One empty single-row cache object per layer, of the stack's own classes."""
        ...

    def encode(self, span: MediaSpan) -> Features:
        """Run the encoder over one span (lazily: the caller evaluates). Called once per content hash."""
        ...

    def prompt_state(self, prompt: Prompt) -> Any | None:
        """Host-side state that positions of this prompt depend on; None when a position is just a count."""
        ...

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> mx.array:
        """Write `tokens` [1, L] = prompt[start : start + L] into `cache`; returns unevaluated logits [1, L, V].

        `features` has an entry, keyed by index in `prompt.media`, for every span that overlaps the chunk. The caller
        evaluates the cache's arrays only, so the logits cost nothing.
        """
        ...

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        """Logits [R, V] after `tokens` [R, 1], whose absolute positions are `positions`."""
        ...

    def close(self) -> None:
        """Drop the weights; the object is not used afterwards."""
        ...
