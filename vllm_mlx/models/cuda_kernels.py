"""What MLX's CUDA backend has no kernel for (`native/decode.cu`). MLX thread only.

A decode step on a GPU is bound by launches, and its attention by a mask that the backend's fused kernels do not take
(docs/benchmarks/gpu.md). So here are one attention for rows of any length, and what stands between two products of a
layer in one launch each. Each has a plain twin that `tests/models/test_cuda_kernels.py` holds it against, where there
is such a GPU.
"""

from __future__ import annotations

import hashlib
import logging
import struct
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import mlx.core as mx

from . import nvrtc

log = logging.getLogger(__name__)

SOURCE = Path(__file__).parents[1] / "native" / "decode.cu"
THREADS = 256
# Tokens that a block of threads attends to, and the most blocks that share a row's head.
SPLIT_TOKENS, MAX_SPLITS = 256, 64
# What a block's shared memory and registers have room for.
MAX_HEADS_PER_KV_HEAD = 8
HEAD_DIMS = (64, 128)
# As the source calls them.
_TYPES = {mx.bfloat16: 16, mx.float16: 15, mx.float32: 32}


@cache
def are_available() -> bool:
    """Whether there is such a device, a compiler for it, and an answer."""
    if not mx.cuda.is_available() or not hasattr(mx.fast, "precompiled_cuda_kernel"):
        return False
    x = mx.ones((1, 1, 8), dtype=mx.float32)
    try:
        total, normed = add_norm(x, x, x[0, 0], 0.0)
        works = bool(mx.allclose(total, 2 * x) & mx.allclose(normed, x))
    except Exception as error:  # compiler, driver, or an interface of MLX's that it calls experimental
        log.warning("Decoding does without CUDA kernels of its own: %s", str(error).split("\n")[0])
        return False
    return works


@cache
def _made(kernel: str, dtype: mx.Dtype, **sizes: int) -> tuple[str, bytes]:
    """The kernel's name, under which MLX keeps it too, and its code."""
    source = SOURCE.read_text()
    macros = {"TYPE": _TYPES[dtype], kernel: 1, **sizes}
    name = f"vllm_mlx_{kernel.lower()}_{hashlib.sha256(repr((source, macros)).encode()).hexdigest()[:16]}"
    return name, nvrtc.compiled(source, {**macros, "NAME": name})


def _launch(
    made: tuple[str, bytes],
    inputs: Sequence[mx.array],
    outputs: Sequence[tuple[tuple[int, ...], mx.Dtype]],
    scalars: Sequence[int | float],
    blocks: tuple[int, int],
    threads: int = THREADS,
) -> list[mx.array]:
    name, code = made
    return mx.fast.precompiled_cuda_kernel(
        name=name,
        compiled_source=code,
        inputs=list(inputs),
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=[_bits(x) if isinstance(x, float) else x for x in scalars],
        grid=(blocks[0] * threads, blocks[1], 1),
        threadgroup=(threads, 1, 1),
        ensure_row_contiguous=True,
    )


def _bits(x: float) -> int:
    """Of the float32: MLX 0.32's binding takes no Python float, in spite of what its message says."""
    (bits,) = struct.unpack("i", struct.pack("f", x))
    return int(bits)


def can_attend(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Whether `ragged_attention` takes these."""
    heads, dim = queries.shape[1], queries.shape[3]
    is_known = dim in HEAD_DIMS and heads // keys.shape[1] <= MAX_HEADS_PER_KV_HEAD and queries.dtype in _TYPES
    return is_known and queries.dtype == keys.dtype == values.dtype


def ragged_attention(
    queries: mx.array, keys: mx.array, values: mx.array, lengths: mx.array, longest: int, scale: float
) -> mx.array:
    """Attention of one token a row to the first `lengths[row]` tokens of its row, whatever lies behind them.

    `queries` [R, H, 1, D], `keys` and `values` [R, K, T, D] where K divides H, `lengths` int32 [R], at least 1, none
    above `longest`; gives [R, H, 1, D].
    """
    rows, heads, _, dim = queries.shape
    kv_heads, capacity, dtype = keys.shape[1], keys.shape[2], queries.dtype
    splits = min(MAX_SPLITS, -(-longest // SPLIT_TOKENS))
    inputs, scalars = (queries, keys, values, lengths), (kv_heads, capacity, scale)
    sizes = {"D": dim, "G": heads // kv_heads}
    out = (rows, heads, 1, dim), dtype
    if splits == 1:
        (answer,) = _launch(_made("ATTENTION", dtype, **sizes), inputs, [out], scalars, (rows * kv_heads, 1))
        return answer
    parts = [((rows, heads, splits, dim), mx.float32), ((rows, heads, splits, 2), mx.float32)]
    sums_and_tops = _launch(_made("ATTENTION", dtype, SPLITS=1, **sizes), inputs, parts, scalars,
                            (rows * kv_heads, splits))  # fmt: skip
    (answer,) = _launch(_made("MERGE", dtype, D=dim), sums_and_tops, [out], (splits,), (rows * heads, 1), dim)
    return answer


def turned_heads(
    heads: mx.array,
    num_heads: int,
    num_kv_heads: int,
    norms: tuple[mx.array, mx.array] | None,
    eps: float,
    positions: mx.array,
    frequencies: mx.array,
) -> tuple[mx.array, mx.array, mx.array]:
    """Queries, keys and values out of one product's row, normed where there are `norms` and turned to their positions.

    `heads` [T, 1, (H + 2 K) * D], `norms` (queries' and keys' weights, [D]), `positions` int32 [T], `frequencies`
    float32 [D / 2]; gives [T, H, 1, D], [T, K, 1, D], [T, K, 1, D].
    """
    num_tokens, dtype, dim = heads.shape[0], heads.dtype, 2 * frequencies.shape[0]
    sizes = {"D": dim, "HEADS": num_heads, "KV_HEADS": num_kv_heads, **({"NORMS": 1} if norms is not None else {})}
    num_warps = num_tokens * (num_heads + 2 * num_kv_heads)
    shapes = [(num_tokens, count, 1, dim) for count in (num_heads, num_kv_heads, num_kv_heads)]
    queries, keys, values = _launch(
        _made("TURN", dtype, **sizes),
        (heads, positions, frequencies, *(norms or ())),
        [(shape, dtype) for shape in shapes],
        (num_tokens, eps),
        (-(-num_warps // 4), 1),
        128,
    )
    return queries, keys, values


def swiglu_halves(both: mx.array) -> mx.array:
    """[T, 1, 2 F], gate and up, -> [T, 1, F]: silu(gate) * up. F is a multiple of 8."""
    num_tokens, width, dtype = both.shape[0], both.shape[2] // 2, both.dtype
    num_blocks = -(-num_tokens * width // (THREADS * 8))
    (out,) = _launch(_made("SWIGLU", dtype), [both], [((num_tokens, 1, width), dtype)], (num_tokens, width),
                     (num_blocks, 1))  # fmt: skip
    return out


def add_norm(x: mx.array, y: mx.array, weight: mx.array, eps: float) -> tuple[mx.array, mx.array]:
    """`x + y`, and its RMS norm times `weight`; [T, 1, W] and `weight` [W], where W is a multiple of 8."""
    num_tokens, _, width = x.shape
    total, normed = _launch(_made("ADD_NORM", x.dtype), [x, y, weight], [(x.shape, x.dtype)] * 2, (width, eps),
                            (num_tokens, 1))  # fmt: skip
    return total, normed
