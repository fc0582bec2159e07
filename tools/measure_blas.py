"""float32 products through MLX's CPU backend with each BLAS under it, as a table: `python tools/measure_blas.py`.

Each variant is a process of its own, because a BLAS cannot be changed once it is loaded. They take turns, one thread
each, and the best run counts, by processor time: on a busy machine that is what can be compared. The numbers in
docs/benchmarks/cpu-blas.md come from here. Linux only.
"""

from __future__ import annotations

import json
import subprocess
import sys

# (what, M, K, N, B is transposed): decoding multiplies few rows by [N, K] weights; attention by [K, N] values.
SHAPES = [
    *((f"{m} x 1024 x 1024", m, 1024, 1024, True) for m in (1, 2, 4, 8, 16, 32, 64)),
    ("16 x 512 x 8192 (a vocabulary)", 16, 512, 8192, True),
    ("1 x 1024 x 1024, B not transposed", 1, 1024, 1024, False),
    ("8 x 1024 x 1024, B not transposed", 8, 1024, 1024, False),
    ("1024 x 1024 x 1024", 1024, 1024, 1024, True),
    ("512 x 4096 x 4096", 512, 4096, 4096, True),
]
VARIANTS = {
    "MLX's own": dict(choice="off"),
    "system OpenBLAS": dict(choice="system", few_row_kernels=False),
    "numpy's OpenBLAS": dict(choice="numpy", few_row_kernels=False),
    "as served": dict(choice="auto"),
    "--batch-invariant": dict(choice="auto", invariant=True),
}
ROUNDS, MAX_RUNS, MAX_SECONDS = 4, 30, 0.5


def measure(variant: str) -> dict[str, float]:
    """GFLOP/s by shape, in this process."""
    import time

    from vllm_mlx import blas

    blas.load(threads=1, **VARIANTS[variant])
    import mlx.core as mx  # after the BLAS

    rates = {}
    for name, m, k, n, is_transposed in SHAPES:
        a = mx.random.normal((m, k), key=mx.random.key(0))
        b = mx.random.normal((n, k) if is_transposed else (k, n), key=mx.random.key(1))
        mx.eval(a, b)
        mx.eval(a @ b.T if is_transposed else a @ b)
        times: list[float] = []
        while len(times) < MAX_RUNS and sum(times) < MAX_SECONDS:
            begin = time.process_time()
            mx.eval(a @ b.T if is_transposed else a @ b)
            times.append(time.process_time() - begin)
        rates[name] = 2 * m * k * n / min(times) / 1e9
    return rates


def main() -> None:
    columns: dict[str, dict[str, float]] = {variant: {} for variant in VARIANTS}
    for variant in [*VARIANTS] * ROUNDS:
        result = subprocess.run([sys.executable, __file__, variant], capture_output=True, text=True, check=True)
        for name, rate in json.loads(result.stdout).items():
            columns[variant][name] = max(rate, columns[variant].get(name, 0.0))
    print("| rows x K x N, GFLOP/s | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for name, *_ in SHAPES:
        print(f"| {name} | " + " | ".join(f"{rates[name]:.1f}" for rates in columns.values()) + " |")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main()
