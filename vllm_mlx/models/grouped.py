"""Lets rows of very different lengths share one forward pass without padding each other. MLX thread only.

The rows of a decode step stand in groups of similar length. Everything that is the same work for every row (norms,
MLP, experts, output head) runs on all rows at once; only the modules that read the cache run once for each group, on
the group's rows with the group's cache and mask. To that end each such module is put into a `ByGroup`, as a LoRA layer
is put around a linear one: a module of the tree replaced by another, nothing patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

# What the cache-reading part of a layer is called, over the model families.
MIXERS = ("self_attn", "linear_attn", "attention", "attn", "mixer", "mamba")


class Group(Protocol):
    """Rows [start, stop) of the step, with their cache for one layer."""

    start: int
    stop: int
    entry: Any


class GroupedMask(Protocol):
    """Stands for a mask until it is known which group asks."""

    def of(self, entry: Any) -> mx.array | str | None: ...


class ByGroup(nn.Module):
    """Calls `inner` once for each group of rows, or plainly when the cache is not grouped.

    Arguments are told apart by the names `inner` gives them; whatever else is asked of it, `inner` answers.
    """

    def __init__(self, inner: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.inner = inner
        self._names = " ".join(names)  # a tuple would be taken for parameters
        self._cache_at = names.index("cache")

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self["inner"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> mx.array:
        cache = args[self._cache_at] if len(args) > self._cache_at else kwargs.get("cache")
        groups: Sequence[Group] | None = getattr(cache, "groups", None)
        if groups is None:
            out: mx.array = self.inner(*args, **kwargs)
            return out
        given = dict(zip(self._names.split(), args, strict=False)) | kwargs
        outs = []
        for group in groups:
            rows = slice(group.start, group.stop)
            own = {name: _rows_of(value, rows, groups[-1].stop) for name, value in given.items()}
            own["cache"] = group.entry
            mask: Any = own.get("mask")
            if hasattr(mask, "of"):
                own["mask"] = mask.of(group.entry)
            outs.append(self.inner(**own))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)


def _rows_of(value: Any, rows: slice, num_rows: int) -> Any:
    """The rows' part of an argument, if it has one for each row: hidden states [B, L, D], position ids [B, L] or
    [3, B, L] (M-RoPE), (cos, sin). What is the same for all rows is passed on."""
    if isinstance(value, tuple):
        return tuple(_rows_of(part, rows, num_rows) for part in value)
    if not isinstance(value, mx.array) or value.ndim < 2:
        return value
    if value.ndim == 3 and value.shape == (3, num_rows, 1):
        return value[:, rows]
    return value[rows] if value.shape[0] == num_rows else value


def group_mixers(model: Any) -> bool:
    """Put every cache-reading module of a model into a `ByGroup`; False, and nothing done, if one is not found."""
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
        setattr(layer, name, ByGroup(inner, names))
    return bool(found)


def ungroup_mixers(model: Any) -> None:
    """Undo `group_mixers`."""
    for layer in getattr(model, "layers", ()):
        for name in MIXERS:
            if isinstance(wrapped := getattr(layer, name, None), ByGroup):
                setattr(layer, name, wrapped.inner)
