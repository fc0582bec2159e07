"""What MLX computes on and how much memory it uses there. Reads counters only: any thread may ask."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from vllm_mlx.models.memory import available_memory_bytes

# glibc's; other C libraries do not have it.
_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


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


def bound_cache(num_bytes: int) -> None:
    """MLX keeps at most so many bytes of freed buffers for reuse; by default it may keep all there is. MLX thread."""
    mx.set_cache_limit(num_bytes)


def finish() -> None:
    """Wait until all work that was launched is done."""
    mx.synchronize()


def release_cached() -> None:
    """Give freed memory back to the system: MLX's cache of buffers, and what the C library keeps. MLX thread.

    On a CPU the buffers are the C library's, and glibc keeps hundreds of MiB of them after a busy hour.
    """
    mx.clear_cache()
    if _MALLOC_TRIM is not None:
        _MALLOC_TRIM(0)


class IdleRelease:
    """An engine's idle callback that releases memory, once, when nothing was done for `after_s`; it makes no work.

    `num_steps` says how much was done. Not at once: the next request would have the same memory mapped again, page by
    page, which takes longer than a short answer.
    """

    def __init__(
        self, num_steps: Callable[[], int], after_s: float = 300.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._num_steps = num_steps
        self._after_s = after_s
        self._clock = clock
        self._seen_steps = -1
        self._idle_since = clock()
        self._is_released = False

    def __call__(self) -> bool:
        now, steps = self._clock(), self._num_steps()
        if steps != self._seen_steps:
            self._seen_steps, self._idle_since, self._is_released = steps, now, False
        elif not self._is_released and now - self._idle_since >= self._after_s:
            release_cached()
            self._is_released = True
        return False


def _backend() -> str:
    if mx.default_device().type != mx.gpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"
