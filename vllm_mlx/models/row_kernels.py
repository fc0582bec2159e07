"""Softmax, exponentials, SwiGLU, norms, rotary positions and attention that do not crawl on a Linux CPU. MLX thread.

MLX's CPU backend on Linux computes e**x, sines and the like one element at a time, in 12 to 20 ns, and composes
attention of that: of a prefill chunk's attention four fifths are softmax. `native/row_kernel.h` does the same a vector
at a time. MLX lets foreign code work on its arrays in one place, a BLAS call, so the kernels sit behind a product with
an `alpha` that no product has: they take their turn in MLX's graph like any other operation and nothing waits for them.

Which way is taken never depends on how many rows there are: a row's answer may not depend on its company.

Where the library is not in the process (macOS, CUDA, no compiler, kernels switched off) `are_available` is false, which
a product asked for the right answer finds out, and everything here is MLX's own operation. All take float32 alone;
other dtypes go MLX's way too. `tests/models/test_row_kernels.py` compares the two ways.
"""

from __future__ import annotations

import functools
import threading
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx_lm.models.activations as lm_activations
import numpy as np

# The numbers in native/gemm.c.
_SOFTMAX, _EXP, _SWIGLU, _RMS_NORM, _ROPE, _ARGMAX = (float.fromhex(f"0x1.fffff{digit}p127") for digit in "2468ac")
# Scores held at once, as floats: half a MiB lies in the second-level cache. 0.7 of the time of 8 MiB at 5,000 keys.
_MOST_SCORES = 1 << 17
# Rows of queries from which a product of scores is computed at full speed.
_FEWEST_ROWS = 64

_FLOATS_COUNT_TO = 1 << 24
# Constant operands of up to so many numbers are kept, and so many of them.
_MOST_KEPT, _MOST_CONSTANTS = 1 << 16, 1024

_mlx_attention, _mlx_rms_norm, _mlx_rope = mx.fast.scaled_dot_product_attention, mx.fast.rms_norm, mx.fast.rope
_mlx_swiglu = lm_activations.swiglu


@functools.cache
def are_available() -> bool:
    """Whether the kernels are in this process, and answer."""
    if mx.default_device().type != mx.cpu:
        return False
    x = mx.array([[0.5, 1.5, -1.0]])
    return bool(mx.allclose(_operation(_EXP, x), mx.exp(x)))


def install(activations: ModuleType) -> None:
    """Let model code find ours where it looks for MLX's operations, if the kernels are there.

    `activations` is the module that a stack's models take their `swiglu` from; call before it loads one.
    """
    if are_available():
        mx.fast.scaled_dot_product_attention = attention
        mx.fast.rms_norm, mx.fast.rope = rms_norm, rope
        activations.swiglu = swiglu  # type: ignore[attr-defined]


def _operation(code: float, x: mx.array, a: mx.array | None = None, b: mx.array | None = None,
               beta: float = 1.0) -> mx.array:
    """The kernel `code` on float32 `x` [..., M, N]; `a` is [..., M, 1 or 2], `b` [1, N]."""
    if a is None:
        batch = x.shape[:-2]
        a = _zeros(x.shape[-2], 1)
        a = mx.broadcast_to(a, (*batch, *a.shape)) if batch else a
    if b is None:
        b = _zeros(a.shape[-1], x.shape[-1])
    return mx.addmm(x, a, b, alpha=code, beta=beta)


class _Constants(threading.local):
    """Operands that are made once for many layers; a thread's own, as arrays are."""

    def __init__(self) -> None:
        self.zeros: dict[tuple[int, int], mx.array] = {}
        self.frequencies: dict[tuple[int, float, int], mx.array] = {}
        self.bias: tuple[mx.array, int, mx.array] | None = None  # the last mask, its group, and what it became


_constants = _Constants()


def _zeros(rows: int, columns: int) -> mx.array:
    """An operand that is not read, or read as zeros; layers of a step share it."""
    known = _constants.zeros.get((rows, columns))
    if known is None:
        known = mx.zeros((rows, columns))
        if rows * columns <= _MOST_KEPT:
            if len(_constants.zeros) >= _MOST_CONSTANTS:
                _constants.zeros.clear()
            mx.async_eval(known)  # to wait for it would be to wait for all that was launched before
            _constants.zeros[rows, columns] = known
    return known


def _suit(*arrays: mx.array) -> bool:
    """Whether the kernels are there and take these."""
    return are_available() and all(a.dtype == mx.float32 and a.ndim > 1 and a.size > 0 for a in arrays)


def exp(x: mx.array) -> mx.array:
    """e**x of [..., N]."""
    if not _suit(x):
        return mx.exp(x)
    return _operation(_EXP, x)


def softmax(x: mx.array) -> mx.array:
    """Along the last axis of [..., N]."""
    if not _suit(x):
        return mx.softmax(x, axis=-1)
    return _operation(_SOFTMAX, x)


def argmax(x: mx.array) -> mx.array | None:
    """int32 [M]: where the first largest number of each row of [M, N] stands, -1 in rows that hold NaN or infinity.

    None where MLX has to do it.
    """
    if not _suit(x) or x.shape[1] >= _FLOATS_COUNT_TO:
        return None
    places = mx.addmm(_zeros(x.shape[0], 1), x, x[:1].T, alpha=_ARGMAX)  # the last operand is not read
    return places[:, 0].astype(mx.int32)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """silu(gate) * x, of equal shapes."""
    if gate.shape != x.shape or not _suit(gate, x):
        result: mx.array = _mlx_swiglu(gate, x)
        return result
    return _operation(_SWIGLU, gate.reshape(-1, 1), x.reshape(-1, 1)).reshape(gate.shape)


def rms_norm(x: mx.array, weight: mx.array | None, eps: float, **others: Any) -> mx.array:
    """`mx.fast.rms_norm` of [..., N]."""
    # Epsilon is the product's beta, and a product with none need not be given what it would be added to.
    if weight is None or weight.dtype != mx.float32 or eps == 0 or others or not _suit(x):
        return _mlx_rms_norm(x, weight, eps, **others)
    return _operation(_RMS_NORM, x.reshape(-1, x.shape[-1]), None, weight[None], beta=eps).reshape(x.shape)


def rope(
    x: mx.array, dims: int, *, traditional: bool, base: float | None, scale: float, offset: int | mx.array,
    freqs: mx.array | None = None, **others: Any,
) -> mx.array:  # fmt: skip
    """`mx.fast.rope` of [B, H, L, D] at `offset`, one for all or [B]."""
    if x.ndim != 4 or traditional or others or dims < 2 or not _suit(x):
        return _mlx_rope(
            x, dims, traditional=traditional, base=base, scale=scale, offset=offset, freqs=freqs, **others
        )
    batch, heads, length, dim = x.shape
    if isinstance(offset, mx.array):
        positions = offset.astype(mx.float32).reshape(-1, 1, 1, 1)
        if length > 1:
            positions = positions + mx.arange(length, dtype=mx.float32)[:, None]
    else:
        positions = mx.arange(offset, offset + length, dtype=mx.float32)[:, None]
    if scale != 1.0:
        positions = positions * scale
    frequencies = _frequencies(dims // 2, base or 0.0, dim) if freqs is None else _padded(1.0 / freqs, dim)
    return _operation(_ROPE, x, mx.broadcast_to(positions, (batch, heads, length, 1)), frequencies)


def _frequencies(half: int, base: float, dim: int) -> mx.array:
    """What each pair of numbers turns by from one position to the next, to the last digit."""
    known = _constants.frequencies.get((half, base, dim))
    if known is None:
        known = _padded(mx.array((base ** (-np.arange(half) / half)).astype(np.float32)), dim)
        mx.async_eval(known)
        _constants.frequencies[half, base, dim] = known
    return known


def _padded(frequencies: mx.array, dim: int) -> mx.array:
    """[N] as the kernel takes it: [1, dim], the number of them last."""
    num = frequencies.shape[0]
    parts = [frequencies.astype(mx.float32), mx.zeros((dim - num - 1,)), mx.array([float(num)])]
    return mx.concatenate(parts)[None]


def attention(
    q: mx.array, k: mx.array, v: mx.array, *, scale: float, mask: mx.array | str | None = None, **others: Any
) -> mx.array:
    """`mx.fast.scaled_dot_product_attention`: queries [B, H, L, D], keys and values [B, K, S, D] where K divides H.

    Head by head of the keys and in blocks of queries, so that the scores stay in the caches and a causal block leaves
    out the keys after it; the heads that share keys are rows of one product.
    """
    if any(value is not None for value in others.values()) or not _suit(q, k, v):
        return _mlx_attention(q, k, v, scale=scale, mask=mask, **others)
    batch, heads, length, dim = q.shape
    kv_heads, span = k.shape[1], k.shape[2]
    group = heads // kv_heads
    queries = (q * scale).reshape(batch, kv_heads, group, length, dim)
    keys = k.swapaxes(-1, -2)
    bias = _bias(mask, group) if isinstance(mask, mx.array) else None
    before = span - length if isinstance(mask, str) else None
    if length == 1 or batch * heads * length * span <= _MOST_SCORES:
        return _attend(queries, keys, v, bias, before)
    block = min(length, max(-(-_FEWEST_ROWS // group), _MOST_SCORES // (batch * group * span)))
    done = []
    for head in range(kv_heads):
        own, outs = slice(head, head + 1), []
        for start in range(0, length, block):
            end = min(start + block, length)
            seen = span if before is None else before + end
            outs.append(
                _attend(
                    queries[:, own, :, start:end],
                    keys[:, own, :, :seen],
                    v[:, own, :seen],
                    None if bias is None else _part(bias, own, start, end),
                    None if before is None else before + start,
                )
            )
        done.append(outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=2))
    return done[0] if len(done) == 1 else mx.concatenate(done, axis=1)


def _attend(
    queries: mx.array, keys: mx.array, values: mx.array, bias: mx.array | None, before: int | None
) -> mx.array:
    """Attention of [B, K, G, L, D] over keys [B, K, D, S] -> [B, K * G, L, D].

    `bias` [B or 1, K or 1, G or 1, L or 1, S] is added to the scores. With `before`, query i sees that many keys and i
    more, and its own.
    """
    batch, kv_heads, group, length, dim = queries.shape
    if bias is not None and length > 1:  # rows of a group want biases of their own
        scores = mx.addmm(mx.broadcast_to(bias, (*queries.shape[:4], keys.shape[-1])), queries, keys[:, :, None])
        out = softmax(scores) @ values[:, :, None]
    elif bias is not None:
        shape = (batch, kv_heads, group, keys.shape[-1])
        scores = mx.addmm(mx.broadcast_to(bias[..., 0, :], shape), queries.reshape(*shape[:3], dim), keys)
        out = softmax(scores) @ values
    else:
        scores = queries.reshape(batch, kv_heads, group * length, dim) @ keys
        columns = None
        if before is not None and length > 1:
            seen = np.arange(before + 1, before + length + 1, dtype=np.float32)
            ranges = np.tile(np.stack([np.zeros_like(seen), seen], axis=-1), (group, 1))
            columns = mx.broadcast_to(mx.array(ranges), (batch, kv_heads, *ranges.shape))
        out = _operation(_SOFTMAX, scores, columns) @ values
    return out.reshape(batch, kv_heads * group, length, -1)


def _part(bias: mx.array, head: slice, start: int, end: int) -> mx.array:
    """Of [B, K or 1, G, L or 1, S], what one head's queries from `start` to `end` need."""
    bias = bias if bias.shape[1] == 1 else bias[:, head]
    return bias if bias.shape[3] == 1 else bias[:, :, :, start:end]


def _bias(mask: mx.array, group: int) -> mx.array:
    """A mask [..., L, S] with up to four axes as numbers to add, [B, K, G, L, S] or 1s. Layers share a step's mask."""
    last = _constants.bias
    if last is not None and last[0] is mask and last[1] == group:
        return last[2]
    bias = mx.where(mask, mx.array(0.0), mx.array(-mx.inf)) if mask.dtype == mx.bool_ else mask.astype(mx.float32)
    bias = bias.reshape(*(1,) * (4 - bias.ndim), *bias.shape)
    heads = bias.shape[1]
    bias = bias[:, :, None] if heads == 1 else bias.reshape(bias.shape[0], heads // group, group, *bias.shape[2:])
    _constants.bias = mask, group, bias
    return bias
