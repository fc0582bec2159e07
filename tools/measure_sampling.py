"""What sampling one step costs, beside the plain full sort: `python tools/measure_sampling.py [ROWS] [VOCAB]`.

Random logits; medians of alternating runs in one process, in milliseconds. The device is MLX's default.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

from vllm_mlx import blas

REPORT = blas.load()

# ruff: noqa: E402  (MLX is imported after the BLAS it is to use)
import mlx.core as mx
import numpy as np

from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.engine.sampler import BatchSampler, SamplingRow

CASES: dict[str, SamplingParams] = {
    "greedy": SamplingParams(),
    "temperature": SamplingParams(temperature=0.7),
    "top_p 0.95": SamplingParams(temperature=0.7, top_p=0.95),
    "top_p 0.5": SamplingParams(temperature=0.7, top_p=0.5),
    "top_k 20, top_p 0.95": SamplingParams(temperature=0.7, top_k=20, top_p=0.95),
    "min_p 0.05": SamplingParams(temperature=0.7, min_p=0.05),
    "greedy, penalties": SamplingParams(presence_penalty=0.5, repetition_penalty=1.1),
    "greedy, 5 logprobs": SamplingParams(num_logprobs=5),
}
ROUNDS = 7


def full_sort(logits: mx.array) -> mx.array:
    """Top-p as it is usually written: the whole vocabulary sorted."""
    scaled = logits / 0.7
    order = mx.argsort(-scaled, axis=-1)
    probs = mx.softmax(mx.take_along_axis(scaled, order, axis=-1), axis=-1)
    kept = mx.where(mx.cumsum(probs, axis=-1) - probs < 0.95, probs, 0.0)
    return mx.take_along_axis(order, mx.random.categorical(mx.log(kept))[:, None], axis=-1)


def main() -> None:
    num_rows, vocab = (int(a) for a in [*sys.argv[1:], "16", "151936"][:2])
    logits = mx.array((np.random.default_rng(0).standard_normal((num_rows, vocab)) * 2.5).astype(np.float32))
    mx.eval(logits)

    def case(params: SamplingParams) -> Callable[[], object]:
        rows = [SamplingRow(params, vocab_size=vocab, seed=i) for i in range(num_rows)]
        sampler = BatchSampler()
        return lambda: sampler.sample(logits, rows).arrays()

    runs = {name: case(params) for name, params in CASES.items()}
    runs["top_p 0.95, full sort"] = lambda: full_sort(logits)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            mx.eval(run())
            times[name].append((time.perf_counter() - start) * 1e3)
    plain = statistics.median(times["top_p 0.95, full sort"])
    print(f"{num_rows} rows, vocabulary {vocab}, {mx.default_device()}, {REPORT}")
    for name, ms in times.items():
        print(f"{name:24s} {statistics.median(ms):8.2f} ms   full sort / this = {plain / statistics.median(ms):6.1f}")


if __name__ == "__main__":
    main()
