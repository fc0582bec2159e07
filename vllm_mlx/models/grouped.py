"""Lets rows of very different lengths share one forward pass without padding each other. MLX thread only.

The rows of a step stand in groups of similar length. Everything that is the same work for every token (norms, MLP,
experts, output head) runs on all tokens at once, each as a row of its own; only the modules that read the cache run
once for each group, on the group's rows with the group's cache and mask. To that end each such module is put into a
`ByGroup`, as a LoRA layer is put around a linear one: a module of the tree replaced by another, nothing patched.

    outside a mixer   tokens [T, 1, D]: those of row 0, then those of row 1, ...
    inside            [rows, longest, D] for each group, padded on the right (`Spread`)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# What the cache-reading part of a layer is called, over the model families.
MIXERS = ("self_attn", "linear_attn", "attention", "attn", "mixer", "mamba")


class Spread:
    """Where the tokens of rows with `counts` tokens each stand: one after the other outside, padded inside a mixer.

    A pad repeats its row's last token; what comes out for it is dropped.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        self.counts = tuple(counts)
        self.num_rows, self.length, self.num_tokens = len(self.counts), max(self.counts), sum(self.counts)
        self._gather: mx.array | None = None
        self._scatter: mx.array | None = None
        if self.num_rows * self.length != self.num_tokens:
            ends = np.cumsum(self.counts)
            places = (ends - self.counts)[:, None] + np.arange(self.length)[None]
            is_token = places < ends[:, None]
            self._gather = mx.array(np.minimum(places, ends[:, None] - 1).ravel().astype(np.uint32))
            self._scatter = mx.array(np.flatnonzero(is_token.ravel()).astype(np.uint32))

    def pad(self, x: mx.array) -> mx.array:
        """[tokens, 1, ...] -> [rows, longest, ...]."""
        x = x.reshape(self.num_tokens, *x.shape[2:])
        return (x if self._gather is None else x[self._gather]).reshape(self.num_rows, self.length, *x.shape[1:])

    def flatten(self, x: mx.array) -> mx.array:
        """[rows, longest, ...] -> [tokens, 1, ...]."""
        x = x.reshape(self.num_rows * self.length, *x.shape[2:])
        return (x if self._scatter is None else x[self._scatter])[:, None]


class Group(Protocol):
    """Tokens [start, stop) of the step, with their rows' cache for one layer; `spread` is None for a token a row."""

    start: int
    stop: int
    entry: Any
    spread: Spread | None


class GroupedMask(Protocol):
    """Stands for a mask until it is known which group asks."""

    def of(self, entry: Any) -> mx.array | str | None: ...


class RowWindow:
    """What the layers put around a model's, and the adapters among its linear ones, know of each other.

    `rows`: for each row that a `ByGroup` is at, the index of its first token in the step; None outside and for plain
    calls. `is_adapted`: some linear layers are not what they were when the model was loaded.
    """

    rows: Sequence[int] | None = None
    is_adapted = False


class Around(nn.Module):
    """A module in the place of `inner`, which answers whatever else is asked of it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self["inner"], name)


class ByGroup(Around):
    """Calls `inner` once for each group of rows, or plainly when the cache is not grouped.

    Arguments are told apart by the names `inner` gives them.
    """

    def __init__(self, inner: nn.Module, names: tuple[str, ...], window: RowWindow) -> None:
        super().__init__(inner)
        self._window = window
        self._names = " ".join(names)  # a tuple would be taken for parameters
        self._cache_at = names.index("cache")

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        cache = args[self._cache_at] if len(args) > self._cache_at else kwargs.get("cache")
        groups: Sequence[Group] | None = getattr(cache, "groups", None)
        if groups is None:
            out: mx.array = self.inner(*args, **kwargs)
            return out
        given = dict(zip(self._names.split(), args, strict=False)) | kwargs
        outs = []
        for group in groups:
            own = {name: _rows_of(value, group, groups[-1].stop) for name, value in given.items()}
            own["cache"] = group.entry
            mask: Any = own.get("mask")
            if hasattr(mask, "of"):
                own["mask"] = mask.of(group.entry)
            self._window.rows = group_rows(group)
            out = self.inner(**own)
            outs.append(out if group.spread is None else group.spread.flatten(out))
        self._window.rows = None
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)


def group_rows(group: Group) -> Sequence[int]:
    """The first token of each of a group's rows."""
    if group.spread is None:
        return range(group.start, group.stop)
    counts = np.asarray(group.spread.counts)
    return tuple((group.start + np.cumsum(counts) - counts).tolist())


def _rows_of(value: Any, group: Group, num_tokens: int) -> Any:
    """The group's part of an argument, if it has one for each token: hidden states [T, 1, D], position ids [T, 1] or
    [3, T, 1] (M-RoPE), (cos, sin). What is the same for all tokens is passed on."""
    if isinstance(value, tuple):
        return tuple(_rows_of(part, group, num_tokens) for part in value)
    if not isinstance(value, mx.array) or value.ndim < 2:
        return value
    tokens = slice(group.start, group.stop)
    if value.ndim == 3 and value.shape == (3, num_tokens, 1):
        axes = value[:, tokens]
        return axes if group.spread is None else mx.stack([group.spread.pad(axis) for axis in axes])
    if value.shape[0] != num_tokens:
        return value
    return value[tokens] if group.spread is None else group.spread.pad(value[tokens])


def group_mixers(model: Any, window: RowWindow, wrap: Callable[..., ByGroup] = ByGroup) -> bool:
    """Put every cache-reading module of a model into a `ByGroup`, made by `wrap`; False, and nothing done, if one is
    not found."""
    found: list[tuple[Any, str, nn.Module, tuple[str, ...]]] = []
    for layer in getattr(model, "layers", ()):
        mixers = [name for name in MIXERS if isinstance(getattr(layer, name, None), nn.Module)]
        if len(mixers) != 1:
            return False
        inner = getattr(layer, mixers[0])
        names = tuple(inspect.signature(inner.__call__).parameters)
        if "cache" not in names:
            return False
        found.append((layer, mixers[0], inner, names))
    for layer, name, inner, names in found:
        setattr(layer, name, wrap(inner, names, window))
    return bool(found)


def ungroup_mixers(model: Any) -> None:
    """Undo `group_mixers`."""
    for layer in getattr(model, "layers", ()):
        for name in MIXERS:
            if isinstance(wrapped := getattr(layer, name, None), ByGroup):
                setattr(layer, name, wrapped.inner)
