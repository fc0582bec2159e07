"""Attention over groups of rows whose projections run once for all of them. MLX thread only.

`ByGroup` calls a whole attention module once a group, so each group reads the four projection matrices again and
launches every small operation again. Where the module's forward is one of the two commonest in mlx-lm, this does what
it does, but only what reads the cache runs group by group:

    queries, keys, values, norms, rotary positions    all tokens
    writing the cache, attention                       each group
    output projection                                  all tokens

A step's rows differ in length, so a decode step attends under a mask, one token a row. MLX's CUDA backend has no fused
kernel for that and falls back to something slow; there the same is composed of plain operations (`COMPOSES_MASKED`).

`tests/models/test_joint.py` holds each listed class against the plain way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import scaled_dot_product_attention

from .grouped import ByGroup, Group, RowWindow, Spread

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
    """A `ByGroup` that calls `inner` as a whole only when the cache is not grouped, and not always then."""

    def __init__(self, inner: nn.Module, names: tuple[str, ...], window: RowWindow) -> None:
        super().__init__(inner, names, window)
        self._has_norms = _KNOWN[_name_of(inner)]

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        groups: Sequence[Group] | None = getattr(cache, "groups", None)
        if groups is None:
            if not (COMPOSES_MASKED and x.shape[1] == 1 and isinstance(mask, mx.array)):
                return super().__call__(x, mask, cache)
            groups = [Together(0, x.shape[0], cache)]
        inner = self.inner
        queries, keys, values = self._project(x, cache.offset)
        outs = []
        for group in groups:
            own_keys, own_values = group.entry.update_and_fetch(_rows_of(keys, group), _rows_of(values, group))
            own_mask = mask.of(group.entry) if hasattr(mask, "of") else mask
            own_queries = _rows_of(queries, group)
            if COMPOSES_MASKED and own_queries.shape[2] == 1 and _are_arrays(own_mask, own_keys):
                out = composed_attention(own_queries, own_keys, own_values, own_mask, inner.scale)
            else:
                out = scaled_dot_product_attention(
                    own_queries, own_keys, own_values, cache=group.entry, scale=inner.scale, mask=own_mask
                )
            outs.append(_tokens_of(out, group))
        joined = outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=0)
        projected: mx.array = inner.o_proj(joined)
        return projected

    def _project(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`x` [T, 1, D] at int32 [T] -> queries [T, heads, 1, dim], keys and values [T, kv heads, 1, dim]."""
        inner, num_tokens = self.inner, x.shape[0]
        queries = inner.q_proj(x).reshape(num_tokens, inner.n_heads, 1, -1)
        keys = inner.k_proj(x).reshape(num_tokens, inner.n_kv_heads, 1, -1)
        values = inner.v_proj(x).reshape(num_tokens, inner.n_kv_heads, 1, -1)
        if self._has_norms:
            queries, keys = inner.q_norm(queries), inner.k_norm(keys)
        return inner.rope(queries, offset=positions), inner.rope(keys, offset=positions), values


def composed_attention(queries: mx.array, keys: mx.array, values: mx.array, mask: mx.array, scale: float) -> mx.array:
    """Attention of one token a row, of plain operations.

    `queries` [R, H, 1, D], `keys` and `values` [R, K, T, D] where K divides H, `mask` bool [R, 1, 1, T]; gives
    [R, H, 1, D].
    """
    rows, heads, _, dim = queries.shape
    grouped = (queries * scale).reshape(rows, keys.shape[1], heads // keys.shape[1], dim)
    scores = grouped @ keys.swapaxes(-1, -2)
    scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    return (mx.softmax(scores, axis=-1, precise=True) @ values).reshape(rows, heads, 1, -1)


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
