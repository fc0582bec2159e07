"""Several prompts' own caches, shown to the model side by side for one forward. MLX thread only.

A pack lives for one step. It holds no keys: what the forward writes goes into the rows' own caches, exactly as if each
had been computed alone. Attention and window layers see all rows at once, padded on the right to the longest chunk and,
where the rows have a past, on its right too; recurrent layers are called row by row, for no padding may pass through
their state.

          past (padded)   chunk (padded)
    row 0 [kkkkkk....]    [nnnnnnn.]
    row 1 [kkk.......]    [nnnnnnnn]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from vllm_mlx.engine.kv_batch import GroupedEntry, GroupSlice, StepPositions
from vllm_mlx.engine.kv_cache import (
    AttentionRow,
    Planes,
    QuantizedAttentionRow,
    RecurrentRow,
    Row,
    RowCache,
    WindowRow,
    causal_mask,
)
from vllm_mlx.models.grouped import Spread


class PackFrame:
    """What all layers share: row i computes `counts[i]` tokens, behind the `starts[i]` that it has."""

    def __init__(self, starts: Sequence[int], counts: Sequence[int]) -> None:
        self.starts = list(starts)
        self.counts = list(counts)
        self.longest = max(counts)
        self.is_even = min(starts) == max(starts)
        self.offset: int | mx.array = self.starts[0] if self.is_even else mx.array(self.starts, dtype=mx.int32)
        self._masks: dict[tuple[int | None, int | None], Any] = {}

    def kept(self, ring: int | None) -> list[int]:
        """Tokens of the past that each row's layer still has: the last `ring`, or all."""
        return self.starts if ring is None else [min(start, ring) for start in self.starts]

    def mask(self, ring: int | None, window: int | None, return_array: bool) -> Any:
        """"causal", or bool [R or 1, 1, longest, past + longest]: what each token of the chunks may see."""
        window = min(window or ring, ring) if ring is not None else window
        past = max(self.kept(ring))
        if self.is_even and not return_array and (window is None or past + self.longest <= window):
            return "causal"
        if (ring, window) not in self._masks:
            self._masks[ring, window] = self._make_mask(ring, window, past)
        return self._masks[ring, window]

    def _make_mask(self, ring: int | None, window: int | None, past: int) -> mx.array:
        if self.is_even:
            return causal_mask(self.longest, past, 0, window)[None, None]
        kept = mx.array(self.kept(ring), dtype=mx.int32)[:, None]
        slots = mx.arange(past + self.longest, dtype=mx.int32)[None]
        # Places are counted from the first token that the row has kept; a slot in the padding has none.
        place = mx.where(slots < past, slots, slots - past + kept)[:, None]
        query = kept[:, :, None] + mx.arange(self.longest, dtype=mx.int32)[None, :, None]
        mask = (place <= query) & ((slots < kept) | (slots >= past))[:, None]
        if window is not None:
            mask = mask & (query < place + window)
        return mask[:, None]


class PackedAttention:
    """One layer's keys and values of all rows of a pack."""

    def __init__(self, rows: Sequence[AttentionRow], frame: PackFrame) -> None:
        self._rows = rows
        self._frame = frame
        self._seen: tuple[Planes, Planes] = ((), ())

    @property
    def offset(self) -> int | mx.array:
        return self._frame.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Any, Any]:
        like = self._rows[0]
        new = like.pack(keys), like.pack(values)
        past = [row.planes() for row in self._rows]
        for i, (row, count) in enumerate(zip(self._rows, self._frame.counts, strict=True)):
            row.put(_row_of(new[0], i, count), _row_of(new[1], i, count), count)
        if any(self._frame.starts):
            new = _behind([p[0] for p in past], new[0]), _behind([p[1] for p in past], new[1])
        self._seen = new
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[Any, Any]:
        keys, values = self._seen
        return self._rows[0].show(keys), self._rows[0].show(values)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self._frame.mask(None, window_size, return_array)

    def size(self) -> int:
        return max(self._frame.starts)

    def empty(self) -> bool:
        return not any(self._frame.starts)

    @property
    def keys(self) -> mx.array:
        return self._seen[0][0]

    @keys.setter
    def keys(self, value: mx.array) -> None:
        """What hangs on `value` (a model split over processes hangs what it sends there) must come with a row's keys,
        since only these are evaluated."""
        self._seen = (value, *self._seen[0][1:]), self._seen[1]
        self._rows[0].keys = mx.depends(self._rows[0].keys, value)

    @property
    def values(self) -> mx.array:
        return self._seen[1][0]

    @values.setter
    def values(self, value: mx.array) -> None:
        self._seen = self._seen[0], (value, *self._seen[1][1:])


class PackedQuantizedAttention(PackedAttention):
    """`PackedAttention` with quantised planes; `bits` and `group_size` tell the model code so."""

    def __init__(self, rows: Sequence[QuantizedAttentionRow], frame: PackFrame) -> None:
        super().__init__(rows, frame)
        self.bits = rows[0].bits
        self.group_size = rows[0].group_size


class PackedWindow:
    """The last tokens of all rows of a pack, in order of position, and their chunks."""

    def __init__(self, rows: Sequence[WindowRow], frame: PackFrame) -> None:
        self.max_size = rows[0].max_size
        self._rows = rows
        self._frame = frame
        self._seen: tuple[mx.array, mx.array] | None = None

    @property
    def offset(self) -> int | mx.array:
        return self._frame.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        past = [(row.keys, row.values) for row in self._rows]
        for i, (row, count) in enumerate(zip(self._rows, self._frame.counts, strict=True)):
            row.update_and_fetch(keys[i : i + 1, :, :count], values[i : i + 1, :, :count])
        if any(self._frame.starts):
            keys, values = (
                _behind([() if pair[side] is None else (pair[side],) for pair in past], (new,))[0]
                for side, new in enumerate((keys, values))
            )
        self._seen = keys, values
        return keys, values

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        assert self._seen is not None
        return self._seen

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self._frame.mask(self.max_size, window_size, return_array)

    def size(self) -> int:
        return min(max(self._frame.starts), self.max_size)

    def empty(self) -> bool:
        return not any(self._frame.starts)


def packed_entries(rows: Sequence[RowCache], starts: Sequence[int], counts: Sequence[int]) -> list[GroupedEntry]:
    """What the model is called with to compute `counts[i]` tokens of each row in one forward, all rows' tokens one
    after the other."""
    frame = PackFrame(starts, counts)
    together = Spread(counts)
    alone = [Spread((count,)) for count in counts]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    entries, positions = [], StepPositions()
    for layer in zip(*(row.rows for row in rows), strict=True):
        if isinstance(layer[0], RecurrentRow):
            slices = [
                GroupSlice(end - count, end, part.entry, spread)
                for part, count, end, spread in zip(layer, counts, ends, alone, strict=True)
            ]
        else:
            slices = [GroupSlice(0, ends[-1], _packed(layer, frame), together)]
        entries.append(GroupedEntry(slices, positions))
    return entries


def _packed(layer: Sequence[Row], frame: PackFrame) -> PackedAttention | PackedWindow:
    match layer[0]:
        case QuantizedAttentionRow():
            return PackedQuantizedAttention([p for p in layer if isinstance(p, QuantizedAttentionRow)], frame)
        case AttentionRow():
            return PackedAttention([p for p in layer if isinstance(p, AttentionRow)], frame)
        case WindowRow():
            return PackedWindow([p for p in layer if isinstance(p, WindowRow)], frame)
    raise AssertionError(f"a {type(layer[0]).__name__} cannot be packed")


def _row_of(planes: Planes, index: int, count: int) -> Planes:
    return tuple(p[index : index + 1, :, :count] for p in planes)


def _behind(past: Sequence[Planes], new: Planes) -> Planes:
    """`new` [R, H, L, D] behind the rows' pasts [1, H, any, D], which are padded to the longest; () for no past."""
    longest = max(p[0].shape[2] for p in past if p)
    planes = []
    for index, plane in enumerate(new):
        parts = [p[index] if p else mx.zeros((1, plane.shape[1], 0, plane.shape[3]), plane.dtype) for p in past]
        parts = [
            p if p.shape[2] == longest else mx.pad(p, [(0, 0), (0, 0), (0, longest - p.shape[2]), (0, 0)])
            for p in parts
        ]
        planes.append(mx.concatenate([mx.concatenate(parts, axis=0), plane], axis=2))
    return tuple(planes)
