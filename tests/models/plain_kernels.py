"""What `cuda_kernels.py` computes, of MLX's own operations: the twins that it is held against, and stands in for."""

from __future__ import annotations

import mlx.core as mx


def ragged_attention(queries, keys, values, lengths, longest, scale):
    rows, heads, _, dim = queries.shape
    assert queries.dtype == keys.dtype == values.dtype
    assert int(mx.max(lengths)) <= longest <= keys.shape[2] and int(mx.min(lengths)) >= 1
    sees = (mx.arange(keys.shape[2])[None] < lengths[:, None])[:, None, None]
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    scores = (q * scale).reshape(rows, keys.shape[1], -1, dim) @ k.swapaxes(-1, -2)
    weights = mx.softmax(mx.where(sees, scores, -1e30), axis=-1)
    return (weights @ v).reshape(rows, heads, 1, dim).astype(queries.dtype)


def turned_heads(heads, num_heads, num_kv_heads, norms, eps, positions, frequencies):
    assert all(norm.dtype == heads.dtype for norm in norms or ())
    num_tokens, dim = heads.shape[0], 2 * frequencies.shape[0]
    parts = heads.astype(mx.float32).reshape(num_tokens, -1, 1, dim)
    queries, keys, values = mx.split(parts, [num_heads, num_heads + num_kv_heads], axis=1)
    if norms is not None:
        queries, keys = (normed(x, weight, eps) for x, weight in zip((queries, keys), norms, strict=True))
    angles = (positions[:, None] * frequencies)[:, None, None]

    def turned(x):
        low, high = mx.split(x, 2, axis=-1)
        return mx.concatenate(
            [low * mx.cos(angles) - high * mx.sin(angles), low * mx.sin(angles) + high * mx.cos(angles)], axis=-1
        )

    return tuple(x.astype(heads.dtype) for x in (turned(queries), turned(keys), values))


def swiglu_halves(both):
    gate, up = mx.split(both.astype(mx.float32), 2, axis=-1)
    return (gate * mx.sigmoid(gate) * up).astype(both.dtype)


def add_norm(x, y, weight, eps):
    assert x.dtype == y.dtype == weight.dtype
    total = x + y
    return total, normed(total.astype(mx.float32), weight, eps).astype(total.dtype)


def normed(x, weight, eps):
    return x * mx.rsqrt(mx.mean(x * x, axis=-1, keepdims=True) + eps) * weight.astype(mx.float32)


ALL = (ragged_attention, turned_heads, swiglu_halves, add_norm)
