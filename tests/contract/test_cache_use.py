"""What model code of the installed mlx-lm and mlx-vlm asks of a cache: the list in `vllm_mlx.models.base`, and no more.

The caches here offer exactly that list, note whatever else is asked for, and keep rows of different lengths side by
side. Each model must answer in a batch as it does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from tests.models.running import greedy
from tests.tiny_models import TEXT
from tests.tiny_vlms import VLM_NAMES, picture
from vllm_mlx.engine.request import Prompt
from vllm_mlx.models import loader

# Asked for with getattr or hasattr, and rightly absent; `groups` by our own `models.grouped`.
PROBES = {"bits", "left_padding", "lengths", "extract", "_offset", "_qwen3_5_decode_left_padding", "groups"}


class StrictKV:
    """Attention cache of R rows, left-padded to the longest: the contract and nothing else."""

    def __init__(self, rows: Sequence[tuple[mx.array, mx.array] | None], lengths: Sequence[int], window: int | None):
        self.asked: set[str] = set()
        self.lengths = list(lengths)
        self.window = window
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        if rows[0] is not None:
            self.keys, self.values = (_stack([row[i] for row in rows if row is not None]) for i in (0, 1))

    def __getattr__(self, name: str) -> Any:
        self.__dict__["asked"].add(name)
        raise AttributeError(name)

    @property
    def offset(self) -> int | mx.array:
        return self.lengths[0] if len(self.lengths) == 1 else mx.array(self.lengths, dtype=mx.int32)

    @property
    def _idx(self) -> int:
        return 0 if self.keys is None else int(self.keys.shape[2])

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys = keys if self.keys is None else mx.concatenate([self.keys, keys], axis=2)
        self.values = values if self.values is None else mx.concatenate([self.values, values], axis=2)
        self.lengths = [n + keys.shape[2] for n in self.lengths]
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        window = window_size or self.window
        if N == 1 and window is not None and self.window is not None:
            window = min(window, self.window)  # PLaMo 3 masks for one token more than its cache keeps
        length = self._idx + N
        if len(self.lengths) == 1:
            if N == 1 and (window is None or length <= window):
                return None
            if window is None and not return_array:
                return "causal"
        ends = mx.arange(length - N, length)[:, None]
        at = mx.arange(length)[None]
        mask = at <= ends
        if window is not None:
            mask = mask & (at > ends - window)
        padding = mx.array([self._idx - n for n in self.lengths])
        return mask[None, None] & (at >= padding[:, None, None, None])

    def keys_and_values(self) -> tuple[mx.array | None, mx.array | None]:
        return self.keys, self.values

    def rows(self) -> list[tuple[mx.array, mx.array]]:
        assert self.keys is not None and self.values is not None
        return [
            (self.keys[i : i + 1, :, self._idx - n :], self.values[i : i + 1, :, self._idx - n :])
            for i, n in enumerate(self.lengths)
        ]


def _stack(rows: Sequence[mx.array]) -> mx.array:
    longest = max(row.shape[2] for row in rows)
    return mx.concatenate([mx.pad(r, [(0, 0), (0, 0), (longest - r.shape[2], 0), (0, 0)]) for r in rows])


def strict(example: Any) -> Any:
    """An empty strict cache for one row, of the kind of the stack's own."""
    kind = type(example).__name__
    if kind == "CacheList":
        return type(example)(*(strict(part) for part in example.caches))
    if kind == "ArraysCache":
        return example
    assert kind in ("KVCache", "RotatingKVCache"), kind
    return StrictKV([None], [0], getattr(example, "max_size", None))


def joined(caches: Sequence[Any]) -> Any:
    """One cache of several rows."""
    first = caches[0]
    if isinstance(first, StrictKV):
        assert all(len(c.lengths) == 1 for c in caches)
        batch = StrictKV([c.rows()[0] for c in caches], [c.lengths[0] for c in caches], first.window)
        batch.asked = set().union(*(c.asked for c in caches))
        return batch
    if type(first).__name__ == "CacheList":
        return type(first)(*(joined([c.caches[i] for c in caches]) for i in range(len(first.caches))))
    batch = type(first)(len(first.cache))
    for slot in range(len(first.cache)):
        batch[slot] = mx.concatenate([c[slot] for c in caches])
    return batch


def asked(cache: Any) -> set[str]:
    if isinstance(cache, StrictKV):
        return cache.asked
    return set().union(*(asked(part) for part in getattr(cache, "caches", ())))


def decode_together(model: Any, prompts: Sequence[Prompt], num_tokens: int) -> tuple[list[list[int]], set[str]]:
    rows, states = [], []
    for prompt in prompts:
        cache = [strict(c) for c in model.make_cache()]
        state = model.prompt_state(prompt)
        features = {i: model.encode(span) for i, span in enumerate(prompt.media)}
        split = len(prompt) // 2
        if model.atomic_spans:
            split = max([split, *(s.end for s in prompt.media if s.start < split)])
        for start, end in ((0, split), (split, len(prompt) - 1)):
            met = {i: features[i] for i, s in enumerate(prompt.media) if s.start < end and start < s.end}
            mx.eval(model.prefill(mx.array([prompt.token_ids[start:end]]), start, cache, state, met))
        rows.append(cache)
        states.append(state)
    batch = [joined(layer) for layer in zip(*rows, strict=True)]
    positions = [len(p) - 1 for p in prompts]
    tokens = [p.token_ids[-1] for p in prompts]
    out: list[list[int]] = [[] for _ in prompts]
    for _ in range(num_tokens):
        logits = model.decode(mx.array(tokens)[:, None], positions, batch, states)
        assert logits.shape == (len(prompts), logits.shape[-1])
        tokens = mx.argmax(logits, axis=-1).tolist()
        positions = [p + 1 for p in positions]
        for row, token in zip(out, tokens, strict=True):
            row.append(token)
    return out, set().union(*(asked(c) for c in batch))


@pytest.mark.parametrize("name", [n for n in TEXT if n != "llama4"])
def test_text_models_need_only_the_contract(name: str, tiny_model: Callable[..., Path]) -> None:
    loaded = loader.load(tiny_model(name))
    texts = ["The quick brown fox " * 12, "What is in this picture?", "def add(a, b):\n    return " * 5]
    prompts = [Prompt(tuple(loaded.tokenizer.encode(text))) for text in texts]
    together, used = decode_together(loaded.model, prompts, 10)
    assert together == [greedy(loaded.model, p.token_ids, 10) for p in prompts]
    assert used <= PROBES


@pytest.mark.parametrize("name", VLM_NAMES)
def test_multimodal_models_need_only_the_contract(name: str, tiny_model: Callable[..., Path]) -> None:
    loaded = loader.load(tiny_model(name))
    media = loaded.media
    assert media is not None
    image = media.placeholders["image"]
    if name.startswith("qwen"):
        image = f"<|vision_start|>{image}<|vision_end|>"
    prompts = [
        Prompt(*media.expand(f"Look: {image} what is it?", [picture(1)])),
        Prompt(*media.expand("The quick brown fox jumps over the lazy dog.")),
        Prompt(*media.expand(f"{image} and {image} differ in", [picture(2, (128, 64)), picture(3)])),
    ]
    together, used = decode_together(loaded.model, prompts, 10)
    assert together == [greedy(loaded.model, p.token_ids, 10, media=p.media) for p in prompts]
    assert used <= PROBES
