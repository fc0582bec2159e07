"""KV of many sequences side by side, one token written to each row per step. MLX thread only.

Rows stand in place, with their lengths on the host; nothing is padded on the left and nobody moves:

              capacity (tokens) ─────────────►
    row 0     [kkkkkkkkkkkk.........]     length 12
    row 1     [kkk..................]     length 3     (free rows have length 0)
    row 2     [kkkkkkkkkkkkkkkkkk...]     length 18
                        ▲ each row's new token goes to its own length; a mask hides what lies beyond

A row brings the buffers it was prefilled into, and leaves by being forgotten (`decode_batch.py` decides who stands with
whom). Window layers are rings: position p stands in slot p mod size. Offsets, write positions and masks are built fresh
from host integers at each step (`Frame`), never updated in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.core as mx

from vllm_mlx.engine.kv_cache import (
    AttentionRow,
    Planes,
    QuantizedAttentionRow,
    RecurrentRow,
    Row,
    RowCache,
    StateCheckpoint,
    WindowRow,
    cut,
    group,
)
from vllm_mlx.models.grouped import Spread


class Frame:
    """What all layers of one step share: positions of the new tokens, made into arrays once.

    Each row gets `num_new` tokens, behind its own length. Where a row has fewer, what is written for the others lies
    beyond its end, hidden from its tokens and written over later.
    """

    def __init__(self, lengths: Sequence[int], num_new: int = 1) -> None:
        self.lengths = list(lengths)
        self.num_new = num_new
        self.span = max(self.lengths) + num_new
        self.is_uniform = min(self.lengths) == max(self.lengths)
        self.offset = mx.array(self.lengths, dtype=mx.int32)
        self._positions = self.offset[:, None]
        if num_new > 1:
            self._positions = self._positions + mx.arange(num_new, dtype=mx.int32)
        self._masks: dict[tuple[int | None, int | None], mx.array | None] = {}
        self._slots: dict[int | None, mx.array] = {}

    @cached_property
    def num_seen(self) -> mx.array:
        """int32 [R]: of a token a row, how many of the row's it sees, itself among them."""
        return self.offset + 1

    def slots(self, ring: int | None) -> mx.array:
        """int32 [R, 1, N, 1]: where each row's tokens are written, in a plain buffer or a ring of that size."""
        if ring not in self._slots:
            positions = self._positions if ring is None else self._positions % ring
            self._slots[ring] = positions[:, None, :, None]
        return self._slots[ring]

    def mask(self, ring: int | None, window: int | None) -> mx.array | None:
        """bool [R, 1, N, span]: the slots each new token may see; None where every row may see all of them."""
        if (ring, window) not in self._masks:
            self._masks[ring, window] = self._make_mask(ring, window)
        return self._masks[ring, window]

    def _make_mask(self, ring: int | None, window: int | None) -> mx.array | None:
        span = self.span if ring is None else min(self.span, ring)
        visible = min(window or self.span, ring or self.span)
        if self.is_uniform and visible >= span and self.num_new == 1:
            return None
        if self.num_new > 1 and ring is not None and self.span > ring:
            raise ValueError("several tokens at once would be written over ones that are still seen")
        slots = mx.arange(span, dtype=mx.int32)
        position = self._positions[:, :, None]
        age = position - slots if ring is None else (position - slots) % ring
        mask = (age >= 0) & (age < visible) & (age <= position)
        return mask[:, None]


class AttentionRows:
    """Keys and values of all rows of one layer, planes [capacity_rows, heads, capacity_tokens, dim]."""

    def __init__(self, like: AttentionRow) -> None:
        self._like = like
        self._keys: Planes = ()
        self._values: Planes = ()
        self._capacity = (0, 0)
        self.frame: Frame | None = None

    # what model code uses

    @property
    def offset(self) -> mx.array:
        assert self.frame is not None
        return self.frame.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        self._keys = self._put(self._keys, self._like.pack(keys))
        self._values = self._put(self._values, self._like.pack(values))
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        assert self.frame is not None
        span = self.frame.span
        keys = tuple(p[:, :, :span] for p in self._keys)
        values = tuple(p[:, :, :span] for p in self._values)
        return self._like.show(keys), self._like.show(values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        assert self.frame is not None and N == 1, "each token of a step is a row of its own"
        return self.frame.mask(None, window_size)

    def seen(self, mask: mx.array | None) -> tuple[mx.array, int] | None:
        """If what `mask`, one of this step's, says is that each row's token sees the first of the row's: how many,
        int32 [R], and the most. None else, and where all rows see the same."""
        frame = self.frame
        if frame is None or mask is None or frame.num_new > 1 or mask is not frame.mask(None, None):
            return None
        return frame.num_seen, frame.span

    def size(self) -> int:
        return self.frame.span - self.frame.num_new if self.frame else 0

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

    # what the batch uses

    def resize(self, num_rows: int, num_tokens: int) -> None:
        self._capacity = num_rows, num_tokens
        self._keys = tuple(_resized(p, num_rows, num_tokens) for p in self._keys)
        self._values = tuple(_resized(p, num_rows, num_tokens) for p in self._values)

    def select(self, keep: mx.array) -> None:
        self._keys = tuple(p[keep] for p in self._keys)
        self._values = tuple(p[keep] for p in self._values)

    def append(self, other: Rows) -> None:
        assert isinstance(other, AttentionRows)
        if not self._keys and not other._keys:
            return
        mine = self._made(self._keys, other._keys), self._made(self._values, other._values)
        more = other._made(other._keys, self._keys), other._made(other._values, self._values)
        self._keys = tuple(mx.concatenate(pair, axis=0) for pair in zip(mine[0], more[0], strict=True))
        self._values = tuple(mx.concatenate(pair, axis=0) for pair in zip(mine[1], more[1], strict=True))

    def adopt(self, row: Row) -> None:
        """Become the only row's buffers, without a copy."""
        assert isinstance(row, AttentionRow)
        self._keys, self._values = row.buffers()

    def segment(self, index: int, start: int, end: int) -> tuple[Planes, Planes]:
        keys = tuple(p[index : index + 1] for p in self._keys)
        values = tuple(p[index : index + 1] for p in self._values)
        return cut(keys, start, end), cut(values, start, end)

    def _put(self, buffers: Planes, new: Planes) -> Planes:
        """The step's tokens into each row, from the row's own length on."""
        assert self.frame is not None
        buffers = self._made(buffers, new)
        if self.frame.is_uniform:
            position = self.frame.lengths[0]
            for buffer, x in zip(buffers, new, strict=True):
                buffer[:, :, position : position + self.frame.num_new] = x
            return buffers
        slots = self.frame.slots(None)
        return tuple(
            mx.put_along_axis(buffer, mx.broadcast_to(slots, x.shape), x, axis=2)
            for buffer, x in zip(buffers, new, strict=True)
        )

    def _made(self, buffers: Planes, like: Planes) -> Planes:
        """The buffers; made on first use."""
        return buffers or tuple(_empty_buffer(x, *self._capacity) for x in like)


class QuantizedAttentionRows(AttentionRows):
    """`AttentionRows` with quantised planes; `bits` and `group_size` tell the model code so."""

    def __init__(self, like: QuantizedAttentionRow) -> None:
        super().__init__(like)
        self.bits = like.bits
        self.group_size = like.group_size

    def seen(self, mask: mx.array | None) -> None:
        return None  # what knows it takes plain arrays


class WindowRows:
    """The last `max_size` tokens of every row, each row a ring."""

    def __init__(self, max_size: int) -> None:
        self.max_size = max_size
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self._capacity = (0, 0)
        self.frame: Frame | None = None

    @property
    def offset(self) -> mx.array:
        assert self.frame is not None
        return self.frame.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        assert self.frame is not None
        self._make(keys, values)
        slots = self.frame.slots(self.max_size)
        self.keys = mx.put_along_axis(self.keys, mx.broadcast_to(slots, keys.shape), keys, axis=2)
        self.values = mx.put_along_axis(self.values, mx.broadcast_to(slots, values.shape), values, axis=2)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self.frame is not None and self.keys is not None and self.values is not None
        span = min(self.frame.span, self.max_size)
        return self.keys[:, :, :span], self.values[:, :, :span]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | None:
        assert self.frame is not None and N == 1, "each token of a step is a row of its own"
        return self.frame.mask(self.max_size, window_size)

    def size(self) -> int:
        return min(self.frame.span - 1, self.max_size) if self.frame else 0

    def empty(self) -> bool:
        return self.keys is None

    @property
    def state(self) -> list[mx.array]:
        return [a for a in (self.keys, self.values) if a is not None]

    def resize(self, num_rows: int, num_tokens: int) -> None:
        num_tokens = min(num_tokens, self.max_size)
        self._capacity = num_rows, num_tokens
        if self.keys is not None and self.values is not None:
            self.keys = _resized(self.keys, num_rows, num_tokens)
            self.values = _resized(self.values, num_rows, num_tokens)

    def select(self, keep: mx.array) -> None:
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[keep], self.values[keep]

    def append(self, other: Rows) -> None:
        assert isinstance(other, WindowRows)
        some = self if self.keys is not None else other
        if some.keys is None or some.values is None:
            return
        self._make(some.keys, some.values)
        other._make(some.keys, some.values)
        self.keys = mx.concatenate([self.keys, other.keys], axis=0)
        self.values = mx.concatenate([self.values, other.values], axis=0)

    def adopt(self, row: Row) -> None:
        assert isinstance(row, WindowRow)
        if row.keys is not None and row.values is not None:
            self.keys, self.values = self._as_ring(row.keys, row.offset), self._as_ring(row.values, row.offset)

    def _make(self, keys: mx.array, values: mx.array) -> None:
        """Buffers, on first use."""
        if self.keys is None or self.values is None:
            self.keys = _empty_buffer(keys, *self._capacity)
            self.values = _empty_buffer(values, *self._capacity)

    def checkpoint(self, index: int, length: int) -> tuple[mx.array, mx.array, int]:
        """What `WindowRow.load` takes: the row's last tokens, back in order of position."""
        assert self.keys is not None and self.values is not None
        kept = min(length, self.max_size)
        keys, values = self.keys[index : index + 1, :, :kept], self.values[index : index + 1, :, :kept]
        if length > self.max_size:
            keys = mx.roll(keys, -(length % self.max_size), axis=2)
            values = mx.roll(values, -(length % self.max_size), axis=2)
        return mx.contiguous(keys), mx.contiguous(values), length

    def _as_ring(self, x: mx.array, offset: int) -> mx.array:
        """Tokens in order of position, turned so that position p stands in slot p mod size."""
        if offset <= self.max_size:
            return x
        return mx.roll(x, offset % self.max_size, axis=2)


class RecurrentRows:
    """State arrays of all rows in the model stack's own holder, batch first."""

    def __init__(self, like: RecurrentRow) -> None:
        self.num_slots = like.num_slots
        self.entry = type(like.entry)(like.num_slots)
        self._num_rows = 0
        self.frame: Frame | None = None

    @property
    def state(self) -> list[mx.array]:
        return [a for a in (self.entry[i] for i in range(self.num_slots)) if a is not None]

    def resize(self, num_rows: int, num_tokens: int) -> None:
        self._num_rows = num_rows
        for i in range(self.num_slots):
            if (array := self.entry[i]) is not None:
                self.entry[i] = _rows_resized(array, num_rows)

    def select(self, keep: mx.array) -> None:
        for i in range(self.num_slots):
            if (array := self.entry[i]) is not None:
                self.entry[i] = array[keep]

    def append(self, other: Rows) -> None:
        """Rows without state yet are zeros, which is what models start from."""
        assert isinstance(other, RecurrentRows)
        for i in range(self.num_slots):
            mine, more = self.entry[i], other.entry[i]
            if mine is None and more is None:
                continue
            if mine is None:
                mine = mx.zeros((self._num_rows, *more.shape[1:]), more.dtype)
            if more is None:
                more = mx.zeros((other._num_rows, *mine.shape[1:]), mine.dtype)
            self.entry[i] = mx.concatenate([mine, more], axis=0)

    def adopt(self, row: Row) -> None:
        assert isinstance(row, RecurrentRow)
        for i, array in enumerate(row.slots()):
            self.entry[i] = array

    def checkpoint(self, index: int, length: int) -> tuple[mx.array | None, ...]:
        slots = (self.entry[i] for i in range(self.num_slots))
        return tuple(None if a is None else mx.contiguous(a[index : index + 1]) for a in slots)


Rows = AttentionRows | WindowRows | RecurrentRows


# ── several groups of rows ──────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class GroupSlice:
    """Tokens [start, stop) of a step and their rows' cache for one layer; without a `spread`, each row has one."""

    start: int
    stop: int
    entry: Any
    spread: Spread | None = None

    @property
    def positions(self) -> mx.array:
        """int32 [T]: where in their sequences the group's tokens stand."""
        offset = mx.array(self.entry.offset, dtype=mx.int32)
        if self.spread is None:
            return offset
        # Rows that begin at one place say so with one number.
        starts = mx.broadcast_to(offset.reshape(-1, 1), (self.spread.num_rows, 1))
        return self.spread.flatten(starts + mx.arange(self.spread.length, dtype=mx.int32))[:, 0]


@dataclass(frozen=True, slots=True)
class GroupedMask:
    """A mask that each group makes for itself."""

    return_array: bool
    window_size: int | None

    def of(self, entry: Any) -> mx.array | None:
        if not hasattr(entry, "update_and_fetch"):
            return None  # recurrent rows are never padded
        return entry.make_mask(1, return_array=self.return_array, window_size=self.window_size)


class StepPositions:
    """Where all tokens of a step stand; made by the first layer that asks, for all."""

    def __init__(self) -> None:
        self._known: mx.array | None = None

    def of(self, groups: Sequence[GroupSlice]) -> mx.array:
        """int32 [T]."""
        if self._known is None:
            parts = [group.positions for group in groups]
            self._known = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return self._known


class GroupedEntry:
    """One layer's cache when rows stand in groups; `models/grouped.py` calls the layer's mixer for each."""

    def __init__(self, groups: list[GroupSlice], positions: StepPositions) -> None:
        self.groups = groups
        self._positions = positions

    @property
    def offset(self) -> mx.array:
        """int32 [T]: positions of all new tokens, for models that turn or number them outside their mixers."""
        return self._positions.of(self.groups)

    # Models split over several processes hang what they send on the keys, so that it is computed with them.

    @property
    def keys(self) -> mx.array:
        keys: mx.array = self.groups[0].entry.keys
        return keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self.groups[0].entry.keys = value

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> GroupedMask:
        return GroupedMask(return_array, window_size)


def grouped_entries(caches: Sequence[BatchCache], spreads: Sequence[Spread | None] = ()) -> list[GroupedEntry]:
    """What the model is called with, for groups that follow each other in the step's tokens."""
    spreads = spreads or [None] * len(caches)
    starts = [0]
    for cache, spread in zip(caches, spreads, strict=True):
        starts.append(starts[-1] + (spread.num_tokens if spread is not None else cache.num_rows))
    places = list(zip(starts, starts[1:], spreads, strict=False))
    layers = zip(*(cache.entries for cache in caches), strict=True)
    positions = StepPositions()
    return [
        GroupedEntry(
            [GroupSlice(start, stop, entry, spread)
             for (start, stop, spread), entry in zip(places, entries, strict=True)],
            positions,
        )
        for entries in layers
    ]  # fmt: skip


class BatchCache:
    """All layers of a group of rows. `entries` is what the model is called with."""

    def __init__(self, like: RowCache) -> None:
        assert like.is_batchable
        self.layers: list[Rows] = [_rows_like(row) for row in like.rows]
        self._groups = like.groups
        self.num_rows = 0
        self.num_tokens = 0

    @property
    def entries(self) -> list[Any]:
        views = [layer.entry if isinstance(layer, RecurrentRows) else layer for layer in self.layers]
        return group(self._groups, views)

    @property
    def state(self) -> list[mx.array]:
        return [a for layer in self.layers for a in layer.state]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.state)

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Make the buffers exactly this many rows and tokens long."""
        if (num_rows, num_tokens) == (self.num_rows, self.num_tokens):
            return
        self.num_rows, self.num_tokens = num_rows, num_tokens
        for layer in self.layers:
            layer.resize(num_rows, num_tokens)

    def select(self, indices: Sequence[int], num_rows: int) -> None:
        """Keep only these rows, in this order, in buffers of `num_rows` rows."""
        keep = mx.array([*indices, *[0] * (num_rows - len(indices))], dtype=mx.uint32)
        for layer in self.layers:
            layer.select(keep)
            layer.resize(num_rows, self.num_tokens)
        self.num_rows = num_rows

    def adopt(self, row: RowCache, num_tokens: int) -> None:
        """Become a batch of this one row, whose buffers are taken over; copied only to have `num_tokens` places."""
        for layer, part in zip(self.layers, row.rows, strict=True):
            layer.adopt(part)
        self.num_rows = self.num_tokens = 0
        self.reserve(1, num_tokens)

    def append(self, other: BatchCache) -> None:
        """Take over the rows of another batch, behind these. Both have the same token capacity."""
        assert self.num_tokens == other.num_tokens
        for layer, more in zip(self.layers, other.layers, strict=True):
            layer.append(more)
        num_rows, num_tokens = self.num_rows + other.num_rows, self.num_tokens
        self.num_rows = 0
        self.reserve(num_rows, num_tokens)

    def begin(self, lengths: Sequence[int], num_new: int = 1) -> None:
        """Set the step's positions: row i gets its next tokens from `lengths[i]` on."""
        frame = Frame(lengths, num_new)
        for layer in self.layers:
            layer.frame = frame

    def checkpoint(self, index: int, length: int) -> StateCheckpoint:
        kept = tuple(x.checkpoint(index, length) for x in self.layers if not isinstance(x, AttentionRows))
        return StateCheckpoint.of(length, kept)

    def segment_layers(self, index: int, start: int, end: int) -> tuple[tuple[Planes, Planes], ...]:
        return tuple(layer.segment(index, start, end) for layer in self.layers if isinstance(layer, AttentionRows))


def _rows_like(row: Row) -> Rows:
    match row:
        case QuantizedAttentionRow():
            return QuantizedAttentionRows(row)
        case AttentionRow():
            return AttentionRows(row)
        case WindowRow():
            return WindowRows(row.max_size)
        case RecurrentRow():
            return RecurrentRows(row)
    raise AssertionError(f"rows of a {type(row).__name__} cannot be batched")


def _empty_buffer(like: mx.array, num_rows: int, num_tokens: int) -> mx.array:
    return mx.zeros((num_rows, like.shape[1], num_tokens, like.shape[3]), like.dtype)


def _resized(buffer: mx.array, num_rows: int, num_tokens: int) -> mx.array:
    """The buffer with other capacities; what lies beyond them is dropped."""
    buffer = _rows_resized(buffer, num_rows)
    rows, heads, tokens, dim = buffer.shape
    if tokens < num_tokens:
        return mx.concatenate([buffer, mx.zeros((rows, heads, num_tokens - tokens, dim), buffer.dtype)], axis=2)
    return buffer if tokens == num_tokens else mx.contiguous(buffer[:, :, :num_tokens])


def _rows_resized(array: mx.array, num_rows: int) -> mx.array:
    rows = array.shape[0]
    if rows < num_rows:
        return mx.concatenate([array, mx.zeros((num_rows - rows, *array.shape[1:]), array.dtype)], axis=0)
    return array if rows == num_rows else mx.contiguous(array[:num_rows])
