"""Attention over groups of rows whose projections run once for all of them. MLX thread only.

`ByGroup` calls a whole attention module once a group, so each group reads the four projection matrices again and
launches every small operation again. Where the module's forward is one of the two commonest in mlx-lm, this does what
it does, but only what reads the cache runs group by group:

    queries, keys, values, norms, rotary positions    all tokens
    writing the cache, attention                       each group
    output projection                                  all tokens

A step's rows differ in length, so a decode step attends under a mask, one token a row. MLX's CUDA backend has no fused
kernel for that and falls back to something slow; there we have one of our own (`cuda_kernels.py`) for rows that see all
of their tokens, and for others the same is composed of plain operations (`COMPOSES_MASKED`).

`tests/models/test_joint.py` holds each listed class against the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from . import cuda_kernels
from .fused import FusedHeads
from .grouped import ByGroup, Group, RowWindow, Spread
from .prompt_attention import composed

# Classes of mlx-lm that project, turn, attend and project back, with the same attribute names; `q_norm` and `k_norm`,
# where a class in the second line has them, are applied to each head before it is turned.
PLAIN = "ernie4_5 ernie4_5_moe gemma granite internlm3 llama mimo phimoe qwen2 qwen2_moe seed_oss starcoder2".split()
WITH_NORMS = "mellum qwen3 qwen3_moe".split()
# 1.4 to 2.6 times as fast as the fallback on an H100, bf16 (docs/benchmarks/gpu.md).
COMPOSES_MASKED = mx.cuda.is_available()
_KNOWN = {f"mlx_lm.models.{name}.Attention": name in WITH_NORMS for name in (*PLAIN, *WITH_NORMS)}


def _name_of(inner: nn.Module) -> str:
    return f"{type(inner).__module__}.{type(inner).__qualname__}"


def is_joint(inner: nn.Module) -> bool:
    """Whether `JointAttention` knows what this module computes."""
    return _name_of(inner) in _KNOWN


def by_group(inner: nn.Module, names: tuple[str, ...], window: RowWindow) -> ByGroup:
    """For `group_mixers`: the quicker of the two ways for this module."""
    return JointAttention(inner, names, window) if is_joint(inner) else ByGroup(inner, names, window)


@dataclass
class Together:
    """All rows of a step that has no groups, as one `Group`."""

    start: int
    stop: int
    entry: Any
    spread: Spread | None = None


class JointAttention(ByGroup):
    """A `ByGroup` that calls `inner` as a whole only when the cache is not grouped, and not always then.

    `heads`: its projections in few launches, where there is such a thing.
    """

    def __init__(self, inner: nn.Module, names: tuple[str, ...], window: RowWindow) -> None:
        super().__init__(inner, names, window)
        self._has_norms = _KNOWN[_name_of(inner)]
        self.heads = FusedHeads.of(inner, has_norms=self._has_norms)

    def is_joint_call(self, x: mx.array, mask: Any, cache: Any) -> bool:
        """Whether `attend` may be called with these: tokens [T, 1, D] of a step of many rows."""
        if getattr(cache, "groups", None) is not None:
            return True
        gains = self.heads is not None or (COMPOSES_MASKED and isinstance(mask, mx.array))
        return gains and x.shape[1] == 1 and hasattr(cache, "frame")

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        if not self.is_joint_call(x, mask, cache):
            return super().__call__(x, mask, cache)
        projected: mx.array = self.inner.o_proj(self.attend(x, mask, cache))
        return projected

    def attend(self, x: mx.array, mask: Any, cache: Any) -> mx.array:
        """All but the output projection: `x` [T, 1, D], tokens of a step or all of one row with a cache of its own,
        -> [T, 1, heads * dim]."""
        groups, positions = _places_of(x.shape[0], cache)
        queries, keys, values = self._project(x, positions)
        outs = []
        for group in groups:
            own_keys, own_values = group.entry.update_and_fetch(_rows_of(keys, group), _rows_of(values, group))
            own_mask = mask.of(group.entry) if hasattr(mask, "of") else mask
            out = self._attend_to(_rows_of(queries, group), own_keys, own_values, own_mask, group.entry)
            outs.append(_tokens_of(out, group))
        return outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)

    def _attend_to(self, queries: mx.array, keys: Any, values: Any, mask: mx.array | None, entry: Any) -> mx.array:
        scale = self.inner.scale
        if COMPOSES_MASKED and queries.shape[2] == 1 and _are_arrays(mask, keys):
            seen = entry.seen(mask) if hasattr(entry, "seen") else None
            if seen is not None and cuda_kernels.can_attend(queries, keys, values):
                num_seen, most_seen = seen
                return cuda_kernels.ragged_attention(queries, entry.keys, entry.values, num_seen, most_seen, scale)
            assert mask is not None
            return composed(queries, keys, values, scale, mask)
        out: mx.array = scaled_dot_product_attention(queries, keys, values, cache=entry, scale=scale, mask=mask)
        return out

    def _project(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`x` [T, 1, D] at int32 [T] -> queries [T, heads, 1, dim], keys and values [T, kv heads, 1, dim]."""
        if self.heads is not None and x.dtype == self.heads.dtype and not self._window.is_adapted:
            return self.heads(x, positions)
        inner, num_tokens = self.inner, x.shape[0]
        queries = inner.q_proj(x).reshape(num_tokens, inner.n_heads, 1, -1)
        keys = inner.k_proj(x).reshape(num_tokens, inner.n_kv_heads, 1, -1)
        values = inner.v_proj(x).reshape(num_tokens, inner.n_kv_heads, 1, -1)
        if self._has_norms:
            queries, keys = inner.q_norm(queries), inner.k_norm(keys)
        return inner.rope(queries, offset=positions), inner.rope(keys, offset=positions), values


def _places_of(num_tokens: int, cache: Any) -> tuple[Sequence[Group], mx.array]:
    """The groups that tokens stand in, and their positions, int32 [T]."""
    groups: Sequence[Group] | None = getattr(cache, "groups", None)
    if groups is not None or hasattr(cache, "frame"):
        return groups or [Together(0, num_tokens, cache)], cache.offset
    positions = mx.arange(cache.offset, cache.offset + num_tokens, dtype=mx.int32)
    return [Together(0, num_tokens, cache, Spread((num_tokens,)))], positions


def _are_arrays(*values: Any) -> bool:
    return all(isinstance(value, mx.array) for value in values)


def _rows_of(x: mx.array, group: Group) -> mx.array:
    """The group's part of [T, heads, 1, dim], as [rows, heads, longest, dim]."""
    own = x if group.stop - group.start == x.shape[0] else x[group.start : group.stop]
    if group.spread is None:
        return own
    return group.spread.pad(own.swapaxes(1, 2)).swapaxes(1, 2)


def _tokens_of(x: mx.array, group: Group) -> mx.array:
    """[rows, heads, longest, dim] -> [tokens, 1, heads * dim]."""
    rows, _, length, _ = x.shape
    if group.spread is None:
        return x.reshape(rows, 1, -1)
    return group.spread.flatten(x.swapaxes(1, 2).reshape(rows, length, -1))
