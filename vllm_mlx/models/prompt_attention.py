"""Attention of prompts in few shapes, on CUDA. MLX thread only.

For prompts MLX's CUDA backend attends by cuDNN, which makes a plan for each shape it has not seen: 40 ms, under a mask
of its own kind up to a second (docs/benchmarks/gpu.md), and hardly two chunks of real prompts have one shape. So
queries and keys are padded to a grid, in a way that the causal mask stays what it is, and where a mask is given the
same is composed of plain operations, as quick and without a plan.

    keys       0 ................ start ........... end ... grid
    queries              grid ... start ........... end ... grid     what comes out in front and behind is dropped
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# A grid of 256 tokens; of 1024 for the ends of long contexts.
GRID, LONG_GRID, LONG = 256, 1024, 4096
# Scores that may be held at once: in half precision 512 MiB, and as much again beside them.
MOST_SCORES = 1 << 28
_PLANNED = (mx.bfloat16, mx.float16)

_mlx_attention = mx.fast.scaled_dot_product_attention


def install() -> None:
    """Let model code find this where it looks for MLX's attention, on CUDA."""
    if mx.cuda.is_available():
        mx.fast.scaled_dot_product_attention = attention


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: Any = None, sinks: Any = None, **options: Any
) -> mx.array:
    """As `mx.fast.scaled_dot_product_attention`, which takes all that has no plan of its own for each shape."""
    rows, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    if num_queries > 1 and sinks is None and q.dtype in _PLANNED:
        if isinstance(mask, str) and mask == "causal" and num_keys >= num_queries:
            # Row by row: another number of rows would be another shape.
            outs = [_on_grid(q[i : i + 1], k[i : i + 1], v[i : i + 1], scale, options) for i in range(rows)]
            return outs[0] if rows == 1 else mx.concatenate(outs, axis=0)
        is_array = isinstance(mask, mx.array) and mask.dtype == mx.bool_ and mask.ndim == 4 and mask.shape[1] == 1
        if is_array and rows * heads * num_queries * num_keys <= MOST_SCORES:
            return composed(q, k, v, scale, mask)
    out: mx.array = _mlx_attention(q, k, v, scale=scale, mask=mask, sinks=sinks, **options)
    return out


def _on_grid(q: mx.array, k: mx.array, v: mx.array, scale: float, options: dict[str, Any]) -> mx.array:
    """Of one row."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    in_front = (num_keys - num_queries) % GRID
    behind = -num_keys % (GRID if num_keys <= LONG else LONG_GRID)
    k, v = _padded(k, 0, behind), _padded(v, 0, behind)
    out: mx.array = _mlx_attention(_padded(q, in_front, behind), k, v, scale=scale, mask="causal", **options)
    return out[:, :, in_front : in_front + num_queries] if in_front or behind else out


def _padded(x: mx.array, in_front: int, behind: int) -> mx.array:
    return mx.pad(x, [(0, 0), (0, 0), (in_front, behind), (0, 0)]) if in_front or behind else x


def composed(q: mx.array, k: mx.array, v: mx.array, scale: float, mask: mx.array) -> mx.array:
    """Attention of plain operations: `q` [R, H, N, D], `k` and `v` [R, K, T, D] where K divides H, `mask` bool
    [R or 1, 1, N, T]."""
    rows, heads, num_queries, dim = q.shape
    kv_heads, num_keys = k.shape[1], k.shape[2]
    grouped = (q * scale).reshape(rows, kv_heads, -1, dim)
    scores = (grouped @ k.swapaxes(-1, -2)).reshape(rows, heads, num_queries, num_keys)
    scores = mx.where(mask, scores, mx.array(mx.finfo(scores.dtype).min, scores.dtype))
    weights = mx.softmax(scores, axis=-1, precise=True).reshape(rows, kv_heads, -1, num_keys)
    return (weights @ v).reshape(rows, heads, num_queries, -1)
