"""Where does MLX compute, and does it compute what it should: for `vllm-mlx doctor`, before anything is served."""

from __future__ import annotations

import time

import mlx.core as mx
import numpy as np


def backend() -> str:
    """Where MLX computes, with the device's name and memory when it has its own."""
    if mx.default_device() == mx.Device(mx.cpu):
        return "MLX on the CPU"
    facts = mx.device_info()
    usable = int(facts.get("max_recommended_working_set_size", 0) or facts.get("total_memory", 0))
    name = "Metal" if mx.metal.is_available() else "CUDA"
    return f"MLX on {name}: {facts.get('device_name', 'unknown device')}, {usable / 2**30:.1f} GiB"


def check_products() -> str:
    """MLX against numpy, and how fast it multiplies. Raises ValueError when they differ."""
    a = np.random.default_rng(0).standard_normal((1024, 1024), dtype=np.float32)
    x = mx.array(a)
    mx.eval(x @ x)
    begin = time.perf_counter()
    product = x @ x
    mx.eval(product)
    seconds = time.perf_counter() - begin
    if not np.allclose(np.array(product), a @ a, rtol=1e-3, atol=1e-2):
        raise ValueError("MLX's product differs from numpy's")
    return f"{2 * 1024**3 / seconds / 1e9:.0f} GFLOP/s in float32"


def check_model_libraries() -> str:
    """The two model libraries import side by side."""
    import mlx_lm  # slow, and asked for only here
    import mlx_vlm

    return f"mlx-lm {mlx_lm.__version__} and mlx-vlm {mlx_vlm.__version__}"
