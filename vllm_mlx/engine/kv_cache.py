"""KV of one sequence, layer by layer, in shapes the model code accepts. MLX thread only.

A `RowCache` is what a prompt is prefilled into and what a prefix hit fills. Its layers are of four kinds, chosen by
what the model's own `make_cache` returns:

  attention   every token's keys and values; any run of tokens can be cut out (a segment)
  window      the last `size` tokens only, in order of position; kept whole (a checkpoint)
  recurrent   a fixed number of state arrays, in the model stack's own class; kept whole
  opaque      a class we do not know; used as it is, one row at a time, kept whole by copying the object

`kv_batch.py` holds the same kinds for many rows. Keys and values are "planes": arrays [1, heads, tokens, dim], one
plane plain, three (packed, scales, biases) when quantised.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx

from vllm_mlx.engine.prefix_cache import Lease, Segment

Planes = tuple[mx.array, ...]

_ATTENTION = frozenset({"KVCache", "SimpleKVCache", "ConcatenateKVCache"})
_WINDOW = frozenset({"RotatingKVCache", "BufferedRotatingKVCache"})
_RECURRENT = frozenset({"ArraysCache", "MambaCache"})
_LIST = frozenset({"CacheList"})


@dataclass(frozen=True, slots=True)
class Quantization:
    """KV stored in `bits` (4 or 8) with a scale and bias for each `group_size` numbers (MLX's affine scheme)."""

    bits: int
    group_size: int = 64


# ── kept KV ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class KVSegment:
    """KV of a run of tokens for the attention layers, in layer order: (key planes, value planes) each."""

    layers: tuple[tuple[Planes, Planes], ...]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for keys, values in self.layers for a in (*keys, *values))

    def arrays(self) -> list[mx.array]:
        return [a for keys, values in self.layers for a in (*keys, *values)]

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        """Two segments that own their memory, so that dropping one gives its bytes back."""
        first, second = self._cut(0, num_tokens), self._cut(num_tokens, None)
        mx.eval(first.arrays(), second.arrays())
        return first, second

    def _cut(self, start: int, end: int | None) -> KVSegment:
        return KVSegment(tuple((cut(k, start, end), cut(v, start, end)) for k, v in self.layers))


@dataclass(frozen=True, slots=True)
class StateCheckpoint:
    """Whole state of the layers that cannot be sliced, after `position` tokens; one entry per such layer."""

    position: int
    layers: tuple[Any, ...]
    nbytes: int

    @classmethod
    def of(cls, position: int, layers: tuple[Any, ...]) -> StateCheckpoint:
        return cls(position, layers, sum(a.nbytes for a in _arrays_in(layers)))

    def arrays(self) -> list[mx.array]:
        return _arrays_in(self.layers)

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        raise AssertionError("a checkpoint is never split")


def cut(planes: Planes, start: int, end: int | None) -> Planes:
    """Copies of tokens [start, end) that do not keep the whole buffer alive."""
    return tuple(mx.contiguous(p[..., start:end, :]) for p in planes)


# ── one layer, one row ──────────────────────────────────────────────────────────────────────────────────────────────


class AttentionRow:
    """All keys and values of one sequence; `offset` counts its tokens. Grows in steps, so most writes are in place.

    `room`: tokens that the first buffer is made for, when it is known how many will come.
    """

    step = 256

    def __init__(self) -> None:
        self.offset = 0
        self.room = 0
        self._keys: Planes = ()
        self._values: Planes = ()

    def pack(self, x: mx.array) -> Planes:
        return (x,)

    def show(self, planes: Planes) -> Any:
        """Planes as the model's attention wants them."""
        return planes[0]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        start, end = self.offset, self.offset + keys.shape[2]
        self._keys = _write(self._keys, self.pack(keys), start, self.step, self.room)
        self._values = _write(self._values, self.pack(values), start, self.step, self.room)
        self.offset = end
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        keys = tuple(p[..., : self.offset, :] for p in self._keys)
        values = tuple(p[..., : self.offset, :] for p in self._values)
        return self.show(keys), self.show(values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        if N == 1 and (window_size is None or self.offset < window_size):
            return None
        if not return_array and (window_size is None or self.offset + N <= window_size):
            return "causal"
        return causal_mask(N, self.offset, 0, window_size)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return not self._keys

    @property
    def state(self) -> list[mx.array]:
        return [*self._keys, *self._values]

    @property
    def keys(self) -> mx.array:
        return self._keys[0]

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self._keys = (value, *self._keys[1:])

    @property
    def values(self) -> mx.array:
        return self._values[0]

    @values.setter
    def values(self, value: mx.array) -> None:
        self._values = (value, *self._values[1:])

    # what the rest of the engine uses

    def put(self, keys: Planes, values: Planes, num_tokens: int) -> None:
        """The next tokens, packed already. An empty row takes the arrays themselves."""
        if self._keys:
            keys = _write(self._keys, keys, self.offset, self.step, self.room)
            values = _write(self._values, values, self.offset, self.step, self.room)
        self._keys, self._values = keys, values
        self.offset += num_tokens

    def planes(self) -> tuple[Planes, Planes]:
        """Key and value planes of exactly the computed tokens."""
        return tuple(p[..., : self.offset, :] for p in self._keys), tuple(
            p[..., : self.offset, :] for p in self._values
        )

    def buffers(self) -> tuple[Planes, Planes]:
        """Key and value planes with the room behind the computed tokens."""
        return self._keys, self._values

    def segment(self, start: int, end: int) -> tuple[Planes, Planes]:
        return cut(self._keys, start, end), cut(self._values, start, end)

    def load(self, pieces: Sequence[tuple[Planes, Planes]], num_tokens: int) -> None:
        """Fill an empty row with the first tokens of consecutive segments, which are copied once, into buffers of
        their own."""
        self.offset = num_tokens
        self._keys = _join([keys for keys, _ in pieces], num_tokens, self.room)
        self._values = _join([values for _, values in pieces], num_tokens, self.room)


class QuantizedAttentionRow(AttentionRow):
    """`AttentionRow` whose planes are quantised as they are written. `bits` tells the model code to use them so."""

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.bits = quantization.bits
        self.group_size = quantization.group_size

    def pack(self, x: mx.array) -> Planes:
        return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits))

    def show(self, planes: Planes) -> Any:
        return planes


class WindowRow:
    """The last `max_size` tokens of one sequence, in order of position; a chunk sees them and itself."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.offset = 0
        self.keys: mx.array | None = None
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None and self.values is not None:
            keys = mx.concatenate([self.keys, keys], axis=2)
            values = mx.concatenate([self.values, values], axis=2)
        self.offset += keys.shape[2] - (0 if self.keys is None else self.keys.shape[2])
        self.keys = _last(keys, self.max_size)
        self.values = _last(values, self.max_size)
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        window = min(window_size or self.max_size, self.max_size)
        kept = min(self.offset, self.max_size)
        if kept + N <= window and not return_array:
            return None if N == 1 else "causal"
        return causal_mask(N, kept, 0, window)

    def size(self) -> int:
        return min(self.offset, self.max_size)

    def empty(self) -> bool:
        return self.keys is None

    @property
    def state(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]

    def checkpoint(self) -> tuple[mx.array, mx.array, int]:
        assert self.keys is not None and self.values is not None
        return mx.contiguous(self.keys), mx.contiguous(self.values), self.offset

    def load(self, kept: tuple[mx.array, mx.array, int]) -> None:
        self.keys, self.values, self.offset = kept


class RecurrentRow:
    """The stack's own state holder (`entry`), batch of one. Its slots are only ever replaced, never written into."""

    def __init__(self, entry: Any, num_slots: int) -> None:
        self.entry = entry
        self.num_slots = num_slots

    @property
    def state(self) -> list[mx.array]:
        return [a for a in self.slots() if a is not None]

    def slots(self) -> tuple[mx.array | None, ...]:
        return tuple(self.entry[i] for i in range(self.num_slots))

    def checkpoint(self) -> tuple[mx.array | None, ...]:
        return self.slots()

    def load(self, kept: tuple[mx.array | None, ...]) -> None:
        for i, array in enumerate(kept):
            self.entry[i] = array


class OpaqueRow:
    """A cache class of the model stack that we do not know; kept by copying the object."""

    def __init__(self, entry: Any) -> None:
        self.entry = entry

    @property
    def state(self) -> list[mx.array]:
        return _arrays_in(self.entry.state)

    def checkpoint(self) -> Any:
        return copy.deepcopy(self.entry)

    def load(self, kept: Any) -> None:
        self.entry = copy.deepcopy(kept)


Row = AttentionRow | WindowRow | RecurrentRow | OpaqueRow


# ── all layers, one row ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Layout:
    """How a model caches: for each layer, the makers of its parts (one part, or several for a CacheList)."""

    make_entries: Callable[[], list[Any]]
    quantization: Quantization | None = None

    def new_row(self) -> RowCache:
        return RowCache(self.make_entries(), self.quantization)


class RowCache:
    """One sequence's cache for all layers. `entries` is what the model is called with."""

    def __init__(self, entries: list[Any], quantization: Quantization | None = None) -> None:
        self.rows: list[Row] = []
        self._groups: list[tuple[Any, int] | None] = []
        for entry in entries:
            if type(entry).__name__ in _LIST:
                parts = list(entry.caches)
                self._groups.append((type(entry), len(parts)))
                self.rows += [_new_row(part, quantization) for part in parts]
            else:
                self._groups.append(None)
                self.rows.append(_new_row(entry, quantization))

    @property
    def entries(self) -> list[Any]:
        return group(self._groups, [model_view(row) for row in self.rows])

    @property
    def groups(self) -> list[tuple[Any, int] | None]:
        return self._groups

    @property
    def state(self) -> list[mx.array]:
        """All arrays, to be evaluated."""
        return [a for row in self.rows for a in row.state]

    @property
    def is_sliceable(self) -> bool:
        """Every layer keeps every token, so any prefix can be cut out."""
        return all(isinstance(row, AttentionRow) for row in self.rows)

    @property
    def is_batchable(self) -> bool:
        return not any(isinstance(row, OpaqueRow) for row in self.rows)

    def make_room(self, num_tokens: int) -> None:
        """Of an empty row: so many tokens are expected. Without it the buffers are copied each time they grow."""
        for row in self.rows:
            if isinstance(row, AttentionRow):
                row.room = num_tokens

    @property
    def num_places(self) -> int | None:
        """Tokens that the attention layers' buffers have room for, if it is the same for all."""
        places = {a.shape[2] for row in self.rows if isinstance(row, AttentionRow) for a in row.state}
        return places.pop() if len(places) == 1 else None

    def trim(self, num_tokens: int) -> None:
        """Forget all but the first tokens; for sliceable rows only."""
        for row in self.rows:
            assert isinstance(row, AttentionRow)
            row.offset = min(row.offset, num_tokens)

    def segment(self, start: int, end: int) -> KVSegment:
        return KVSegment(tuple(r.segment(start, end) for r in self.rows if isinstance(r, AttentionRow)))

    def checkpoint(self, position: int) -> StateCheckpoint:
        kept = tuple(r.checkpoint() for r in self.rows if not isinstance(r, AttentionRow))
        return StateCheckpoint.of(position, kept)

    def load(self, lease: Lease) -> None:
        """Fill an empty row with a leased prefix; the prefix cache's arrays are copied or shared, never written."""
        segments = [s for s in lease.segments() if isinstance(s, KVSegment)]
        checkpoint = lease.checkpoint
        kept = iter(checkpoint.layers if isinstance(checkpoint, StateCheckpoint) else ())
        index = 0
        for row in self.rows:
            if isinstance(row, AttentionRow):
                row.load([segment.layers[index] for segment in segments], lease.num_tokens)
                index += 1
            else:
                row.load(next(kept))


def group(groups: Sequence[tuple[Any, int] | None], views: Sequence[Any]) -> list[Any]:
    """Views of parts, put together into what the model expects per layer."""
    entries, position = [], 0
    for kind in groups:
        if kind is None:
            entries.append(views[position])
            position += 1
        else:
            make, count = kind
            entries.append(make(*views[position : position + count]))
            position += count
    return entries


def model_view(row: Row) -> Any:
    """What the model is given for this part."""
    return row.entry if isinstance(row, RecurrentRow | OpaqueRow) else row


def _new_row(entry: Any, quantization: Quantization | None) -> Row:
    name = type(entry).__name__
    if name in _ATTENTION:
        return QuantizedAttentionRow(quantization) if quantization else AttentionRow()
    if name in _WINDOW and not getattr(entry, "keep", 0):
        return WindowRow(entry.max_size)
    if name in _RECURRENT:
        return RecurrentRow(entry, len(entry.cache))
    return OpaqueRow(entry)


# ── bytes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a row by its length: `per_token` grows for ever, windows up to their size, `fixed` is state."""

    per_token: int = 0
    windows: tuple[tuple[int, int], ...] = ()
    fixed: int = 0

    def bytes_for(self, num_tokens: int) -> int:
        if num_tokens <= 0:
            return 0
        windows = sum(per_token * min(num_tokens, size) for per_token, size in self.windows)
        return self.per_token * num_tokens + windows + self.fixed


class Prefills(Protocol):
    def __call__(self, tokens: mx.array, entries: list[Any]) -> Any: ...


def measure_footprint(layout: Layout, prefill: Prefills) -> Footprint:
    """Read the footprint off the shapes of a two-token forward that is traced but never evaluated.

    What opaque parts hold may grow too; a three-token forward tells by how much.
    """
    row = layout.new_row()
    prefill(mx.zeros((1, 2), dtype=mx.int32), row.entries)
    per_token, windows, fixed = 0, [], 0
    if any(isinstance(part, OpaqueRow) for part in row.rows):
        longer = layout.new_row()
        prefill(mx.zeros((1, 3), dtype=mx.int32), longer.entries)
        per_token = max(0, _opaque_bytes(longer) - _opaque_bytes(row))
        fixed = max(0, _opaque_bytes(row) - 2 * per_token)
    for part in row.rows:
        if isinstance(part, AttentionRow):
            per_token += sum(a.nbytes // a.shape[2] for a in part.state)
        elif isinstance(part, WindowRow):
            windows.append((sum(a.nbytes // a.shape[2] for a in part.state), part.max_size))
        elif isinstance(part, RecurrentRow):
            fixed += sum(a.nbytes for a in part.state)
    return Footprint(per_token, tuple(windows), fixed)


def _opaque_bytes(row: RowCache) -> int:
    return sum(a.nbytes for part in row.rows if isinstance(part, OpaqueRow) for a in part.state)


# ── small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


def causal_mask(num_queries: int, offset: int, first_key: int, window: int | None) -> mx.array:
    """bool [num_queries, offset - first_key + num_queries]: query i stands at offset + i and sees keys up to itself,
    the last `window` of them if there is one."""
    queries = mx.arange(offset, offset + num_queries)[:, None]
    keys = mx.arange(first_key, offset + num_queries)[None]
    mask = queries >= keys
    if window is not None:
        mask = mask & (queries < keys + window)
    return mask


def capacity_for(length: int) -> int:
    """Tokens a buffer is made for when its longest row has `length`: a sixth more, at least one."""
    return length + 1 + length // 6


def _write(buffers: Planes, new: Planes, start: int, step: int, room: int = 0) -> Planes:
    """`new` written at `start`; buffers grow by whole steps, or to `room`, when it does not fit."""
    end = start + new[0].shape[2]
    if not buffers or end > buffers[0].shape[2]:
        capacity = room if room >= end else (end + step - 1) // step * step
        buffers = tuple(_grown(buffers[i] if buffers else None, x, start, capacity) for i, x in enumerate(new))
    written = []
    for buffer, x in zip(buffers, new, strict=True):
        buffer[..., start:end, :] = x
        written.append(buffer)
    return tuple(written)


def _grown(buffer: mx.array | None, like: mx.array, used: int, capacity: int) -> mx.array:
    *lead, _, dim = like.shape
    if buffer is None:
        return mx.zeros((*lead, capacity, dim), like.dtype)
    return mx.concatenate([buffer[..., :used, :], mx.zeros((*lead, capacity - used, dim), like.dtype)], axis=2)


def _join(pieces: Sequence[Planes], num_tokens: int, capacity: int) -> Planes:
    """The first tokens of the pieces, one after the other, with room for `capacity` in all."""
    joined = []
    for whole in zip(*pieces, strict=True):
        *parts, last = whole
        parts.append(last[:, :, : num_tokens - sum(part.shape[2] for part in parts)])
        lead, dim = last.shape[:2], last.shape[3]
        room = [mx.zeros((*lead, capacity - num_tokens, dim), last.dtype)] if capacity > num_tokens else []
        joined.append(mx.concatenate([*parts, *room], axis=2))
    return tuple(joined)


def _last(x: mx.array, size: int) -> mx.array:
    return x if x.shape[2] <= size else x[..., -size:, :]


def _arrays_in(value: Any) -> list[mx.array]:
    if isinstance(value, mx.array):
        return [value]
    if isinstance(value, list | tuple):
        return [a for item in value for a in _arrays_in(item)]
    if hasattr(value, "state"):
        return _arrays_in(value.state)
    return []
