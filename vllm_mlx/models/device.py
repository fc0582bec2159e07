"""What MLX computes on and how much memory it uses there. Reads counters only: any thread may ask."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from vllm_mlx.models.memory import available_memory_bytes


@dataclass(frozen=True, slots=True)
class DeviceReport:
    """`backend` is cpu, metal or cuda; bytes are MLX's own, which on a CPU are a part of the process's."""

    backend: str
    name: str
    active_bytes: int
    peak_bytes: int
    cached_bytes: int


def report() -> DeviceReport:
    info = mx.device_info()
    return DeviceReport(
        backend=_backend(),
        name=str(info.get("device_name", "")),
        active_bytes=mx.get_active_memory(),
        peak_bytes=mx.get_peak_memory(),
        cached_bytes=mx.get_cache_memory(),
    )


def free_bytes() -> int:
    """What can still be allocated: on an accelerator its memory less what is in use, else what the system has left."""
    has_gpu = _backend() != "cpu"
    available = available_memory_bytes(mx.device_info(), has_gpu=has_gpu)
    return max(0, available - mx.get_active_memory()) if has_gpu else available


def capacity_bytes() -> int:
    """Bytes the accelerator can hold (on a CPU: what the system has left)."""
    return available_memory_bytes(mx.device_info(), has_gpu=_backend() != "cpu")


def release_cached() -> None:
    """Give MLX's cache of freed buffers back. MLX thread."""
    mx.clear_cache()


def _backend() -> str:
    if mx.default_device().type != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
