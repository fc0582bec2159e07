"""How fast this machine copies and multiplies through MLX, measured. MLX thread only."""

from __future__ import annotations

import time
from collections.abc import Callable

import mlx.core as mx

NUM_TRIES = 7


def measure_rates() -> dict[str, float]:
    """`bytes_per_s` of a large copy (read and written), `flop_per_s` of a square product in the type that models are
    computed in; the best of a few tries."""
    is_gpu = mx.default_device().type == mx.gpu
    x = mx.zeros(((1 << 28) if is_gpu else (1 << 24),), dtype=mx.float32)
    size = 8192 if is_gpu else 1024
    a = mx.random.normal((size, size)).astype(mx.bfloat16 if is_gpu else mx.float32)
    mx.eval(x, a)
    return {
        "bytes_per_s": 2 * x.nbytes / _least_s(lambda: mx.eval(x + 1)),
        "flop_per_s": 2 * size**3 / _least_s(lambda: mx.eval(a @ a)),
    }


def _least_s(job: Callable[[], None]) -> float:
    times = []
    for _ in range(NUM_TRIES):
        start = time.perf_counter()
        job()
        times.append(time.perf_counter() - start)
    return min(times)
