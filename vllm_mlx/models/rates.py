"""How fast this machine moves bytes and multiplies through MLX, measured. MLX thread only."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

NUM_TRIES = 7


def measure_rates() -> dict[str, float]:
    """`bytes_per_s` as weights are read in decoding, `flop_per_s` of a square product in the type that models are
    computed in; the best of a few tries.

    On a GPU bytes are those of a large copy, read and written. On a CPU a copy would measure how fast the system hands
    out fresh pages, some GB/s; so a vector is multiplied by a matrix that no cache holds.
    """
    is_gpu = mx.default_device().type == mx.gpu
    size = 8192 if is_gpu else 1024
    a = mx.random.normal((size, size)).astype(mx.bfloat16 if is_gpu else mx.float32)
    mx.eval(a)
    return {
        "bytes_per_s": _copied_bytes_per_s() if is_gpu else _read_bytes_per_s(),
        "flop_per_s": 2 * size**3 / _least_s(lambda: mx.eval(a @ a)),
    }


def _copied_bytes_per_s() -> float:
    x = mx.zeros((1 << 28,), dtype=mx.float32)
    mx.eval(x)
    return 2 * x.nbytes / _least_s(lambda: mx.eval(x + 1))


def _read_bytes_per_s() -> float:
    matrix, vector = mx.ones((1 << 13, 1 << 12)), mx.ones((1, 1 << 12))
    mx.eval(matrix, vector)
    return matrix.nbytes / _least_s(lambda: mx.eval(vector @ matrix.T))


def _least_s(job: Callable[[], None]) -> float:
    times = []
    for _ in range(NUM_TRIES):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)
