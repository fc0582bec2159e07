"""Kept KV as plain arrays for the disk, and back. MLX thread only.

What is kept is nested tuples of arrays, numbers and None (`kv_cache`); the structure becomes JSON with a number for
each array. bfloat16, which numpy lacks, travels as its bits. State of classes we do not know is not written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from vllm_mlx.engine.disk_blocks import DamagedBlock, Packed
from vllm_mlx.engine.kv_cache import KVSegment, StateCheckpoint
from vllm_mlx.engine.prefix_cache import Segment


class KVCodec:
    """`disk_tier.Codec` of the real caches. Copies on the way out and on the way in, so nothing shares a mapping."""

    def pack(self, parts: Sequence[tuple[Segment, int, int]]) -> Packed | None:
        packed = [_pack(segment.layers, slice(a, b)) for segment, a, b in parts if isinstance(segment, KVSegment)]
        if not packed or (first := packed[0]) is None:
            return None
        if len(packed) == 1:
            return first
        planes = zip(*(p.arrays for p in packed if p is not None), strict=True)
        return Packed(tuple(np.concatenate(plane, axis=-2) for plane in planes), first.structure)

    def unpack(self, packed: Packed, start: int, end: int) -> KVSegment:
        return KVSegment(_unpack(packed, slice(start, end)))

    def pack_state(self, checkpoint: Segment) -> Packed | None:
        assert isinstance(checkpoint, StateCheckpoint)
        return _pack(checkpoint.layers, None)

    def unpack_state(self, packed: Packed, position: int) -> StateCheckpoint:
        return StateCheckpoint.of(position, _unpack(packed, None))


class _Foreign(Exception):
    """An object that is neither array, number, None nor a tuple of these."""


def _pack(value: Any, tokens: slice | None) -> Packed | None:
    arrays: list[np.ndarray] = []
    try:
        structure = _describe(value, tokens, arrays)
    except _Foreign:
        return None
    return Packed(tuple(arrays), json.dumps(structure, separators=(",", ":")))


def _describe(value: Any, tokens: slice | None, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, mx.array):
        dtype = str(value.dtype).removeprefix("mlx.core.")
        bits = value.view(mx.uint16) if value.dtype == mx.bfloat16 else value
        whole = np.asarray(bits)
        arrays.append(np.array(whole if tokens is None else whole[..., tokens, :], order="C", copy=True))
        return {"array": len(arrays) - 1, "dtype": dtype}
    if isinstance(value, tuple | list):
        return [_describe(item, tokens, arrays) for item in value]
    if value is None or isinstance(value, int):
        return value
    raise _Foreign


def _unpack(packed: Packed, tokens: slice | None) -> Any:
    try:
        return _restore(json.loads(packed.structure), packed.arrays, tokens)
    except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
        raise DamagedBlock(f"A block's structure cannot be read ({error}).") from error


def _restore(structure: Any, arrays: tuple[np.ndarray, ...], tokens: slice | None) -> Any:
    if isinstance(structure, dict):
        whole = arrays[structure["array"]]
        array = mx.array(whole if tokens is None else whole[..., tokens, :])
        dtype = getattr(mx, structure["dtype"])
        return array.view(dtype) if array.dtype != dtype else array
    if isinstance(structure, list):
        return tuple(_restore(item, arrays, tokens) for item in structure)
    return structure
