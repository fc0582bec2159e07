"""Row operations and attention on the CPU, MLX's own and ours: `python -m tools.measure_rows`.

Both sides take turns in one process; medians, in milliseconds by the clock. float32, 8 heads over 4 of keys, 64 wide.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from vllm_mlx import blas

REPORT = blas.load()

# ruff: noqa: E402  (MLX is imported after the BLAS it is to use)
import mlx.core as mx

from vllm_mlx.models import row_kernels as ours

ROUNDS = 9
Case = tuple[Callable[[], mx.array], Callable[[], mx.array | None]]


def cases() -> dict[str, Case]:
    vocabulary, scores = mx.random.normal((16, 151_936)), mx.random.normal((512, 2048))
    gate, up = mx.random.normal((512, 1536)), mx.random.normal((512, 1536))
    hidden, weight = mx.random.normal((512, 512)), mx.random.normal((512,))
    heads = mx.random.normal((1, 8, 512, 64))
    mx.eval(vocabulary, scores, gate, up, hidden, weight, heads)
    turn: dict[str, Any] = {"traditional": False, "base": 1e6, "scale": 1.0, "offset": 1000}
    found: dict[str, Case] = {
        "softmax 512 x 2048": (lambda: mx.softmax(scores, axis=-1), lambda: ours.softmax(scores)),
        "exp 16 x 151,936": (lambda: mx.exp(vocabulary), lambda: ours.exp(vocabulary)),
        "argmax 16 x 151,936": (lambda: mx.argmax(vocabulary, axis=-1), lambda: ours.argmax(vocabulary)),
        "SwiGLU 512 x 1536": (lambda: ours._mlx_swiglu(gate, up), lambda: ours.swiglu(gate, up)),
        "RMS norm 512 x 512": (
            lambda: ours._mlx_rms_norm(hidden, weight, 1e-6), lambda: ours.rms_norm(hidden, weight, 1e-6)
        ),
        "rotary positions 8 x 512 x 64": (
            lambda: ours._mlx_rope(heads, 64, **turn), lambda: ours.rope(heads, 64, **turn)
        ),
    }  # fmt: skip
    for rows, length, span in ((1, 512, 512), (1, 512, 2048), (1, 64, 16_384), (1, 512, 16_384), (32, 1, 1280)):
        found[f"attention, {rows} x {length} queries of {span} keys"] = attention_case(rows, length, span)
    return found


def attention_case(rows: int, length: int, span: int) -> Case:
    """A prompt's last chunk, or a decode step whose rows differ in length by one."""
    q, k, v = (mx.random.normal((rows, heads, n, 64)) for heads, n in ((8, length), (4, span), (4, span)))
    mask: mx.array | str = "causal"
    if length == 1:
        mask = (mx.arange(span) < mx.arange(span - rows, span)[:, None])[:, None, None]
    mx.eval(q, k, v, mask)
    return (
        lambda: ours._mlx_attention(q, k, v, scale=0.125, mask=mask),
        lambda: ours.attention(q, k, v, scale=0.125, mask=mask),
    )


def main() -> int:
    print(REPORT)
    if not ours.are_available():
        print("Our kernels are not in use here; there is nothing to compare.")
        return 1
    for name, sides in cases().items():
        times: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for side, taken in zip(sides, times, strict=True):
                started = time.perf_counter()
                mx.eval(side())
                taken.append((time.perf_counter() - started) * 1e3)
        mlx_s, own = map(statistics.median, times)
        print(f"{name:42}  MLX {mlx_s:8.2f}  ours {own:8.2f}  {mlx_s / own:5.1f} times as fast")
    return 0


if __name__ == "__main__":
    sys.exit(main())
