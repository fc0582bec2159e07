"""Weights in huge pages on Linux: a step reads all of them, and address translation then costs a tenth of it or more.

MLX's CPU backend takes its memory from malloc, in pages of 4 KiB. Where the system leaves the choice to the program
(/sys/kernel/mm/transparent_hugepage/enabled is madvise, the usual default, or always), the pages under the weights are
put together in place.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import mlx.core as mx
import numpy as np

PAGE_BYTES = 2 << 20
_LEAST_BYTES = 4096  # of an array that is worth it
_BETWEEN_BYTES = 8192  # malloc's own words, and the rounding to pages
_HUGEPAGE, _COLLAPSE = 14, 25  # madvise's; COLLAPSE is Linux 6.1's, before it the kernel takes its time


def merge(arrays: Iterable[mx.array]) -> int:
    """Put the memory of evaluated arrays into huge pages; returns the bytes for which that worked at once."""
    if not sys.platform.startswith("linux") or mx.default_device().type != mx.cpu:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    num_merged = 0
    for start, end in _ranges(arrays):
        # Never beyond the weights: what lies around them is other people's, and may not be mapped.
        first, last = -(-start // PAGE_BYTES) * PAGE_BYTES, end // PAGE_BYTES * PAGE_BYTES
        if first < last and madvise(first, last - first, _HUGEPAGE) == 0:
            num_merged += (last - first) * (madvise(first, last - first, _COLLAPSE) == 0)
    return num_merged


def _ranges(arrays: Iterable[mx.array]) -> list[tuple[int, int]]:
    """Addresses of the arrays' memory; those that all but touch are one."""
    places = []
    for array in arrays:
        if array.nbytes >= _LEAST_BYTES:
            memory = np.asarray(memoryview(mx.view(array, mx.uint8)))
            places.append((memory.ctypes.data, memory.ctypes.data + memory.nbytes))
    merged: list[tuple[int, int]] = []
    for start, end in sorted(places):
        if merged and start - merged[-1][1] <= _BETWEEN_BYTES:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


