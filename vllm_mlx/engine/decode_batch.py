"""Which sequence stands in which row of the batched KV, and how long each is. MLX thread only.

Rows are made in a few sizes (1, 2, 3, 4, 6, 8, 12, 16, ...): a join or a leave touches only its own row, and the
buffers are copied only when the size changes. Free rows are computed along and thrown away; that is cheaper than a
copy of the whole batch at each change, and it bounds the number of shapes a step can have.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.engine.kv_batch import BatchCache
from vllm_mlx.engine.kv_cache import KVSegment, RowCache, StateCheckpoint

ROW_SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)


class DecodeBatch:
    """`calm_steps`: for so many steps the batch must have been small before its buffers shrink."""

    calm_steps = 8

    def __init__(self, like: RowCache) -> None:
        self.cache = BatchCache(like)
        self._rows: list[str | None] = []
        self._lengths: list[int] = []
        self._index: dict[str, int] = {}
        self._num_calm = 0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._index

    def __len__(self) -> int:
        return len(self._index)

    @property
    def num_rows(self) -> int:
        """Rows computed each step, free ones included."""
        return len(self._rows)

    def index(self, request_id: str) -> int:
        return self._index[request_id]

    def join(self, request_id: str, row: RowCache, length: int) -> None:
        """Copy a sequence's cache of `length` tokens into a free row."""
        if None not in self._rows:
            size = next(size for size in ROW_SIZES if size > len(self._rows))
            self._lengths += [0] * (size - len(self._rows))
            self._rows += [None] * (size - len(self._rows))
        index = self._rows.index(None)
        self._rows[index], self._lengths[index], self._index[request_id] = request_id, length, index
        self._reserve()
        self.cache.join(index, row)

    def leave(self, request_id: str) -> None:
        """Free the row; its contents are hidden from now on, and overwritten by the next to join."""
        index = self._index.pop(request_id)
        self._rows[index], self._lengths[index] = None, 0

    def begin_step(self, request_ids: Sequence[str]) -> list[int]:
        """Set the positions for a step that gives each of these one token; returns the position of every row's token.

        Rows that are not named are computed too, but do not move on.
        """
        self._settle()
        self._reserve()
        positions = list(self._lengths)
        self.cache.begin(positions)
        for request_id in request_ids:
            self._lengths[self._index[request_id]] += 1
        return positions

    def segment(self, request_id: str, start: int, end: int) -> KVSegment:
        return KVSegment(self.cache.segment_layers(self._index[request_id], start, end))

    def checkpoint(self, request_id: str, length: int) -> StateCheckpoint:
        """The row's state that cannot be sliced, after `length` tokens: its length as of the step just built."""
        index = self._index[request_id]
        assert self._lengths[index] == length
        return self.cache.checkpoint(index, length)

    # ── sizes ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _reserve(self) -> None:
        """Buffers for one more token in the longest row. Growing leaves room for a quarter more."""
        needed = max(self._lengths) + 1
        held = self.cache.num_tokens
        if needed > held:
            held = needed + needed // 4 if held else needed
        self.cache.reserve(len(self._rows), held)

    def _settle(self) -> None:
        """Give memory back when the batch has been much smaller than its buffers for a while."""
        num_rows = next(size for size in ROW_SIZES if size >= len(self._index))
        longest = max(self._lengths) + 1
        is_small = num_rows < len(self._rows) or longest * 2 < self.cache.num_tokens - self.cache.token_step
        self._num_calm = self._num_calm + 1 if is_small else 0
        if self._num_calm <= self.calm_steps:
            return
        self._num_calm = 0
        kept = [i for i, request_id in enumerate(self._rows) if request_id is not None]
        free = num_rows - len(kept)
        self._rows = [*(self._rows[i] for i in kept), *[None] * free]
        self._lengths = [*(self._lengths[i] for i in kept), *[0] * free]
        self._index = {request_id: i for i, request_id in enumerate(self._rows) if request_id is not None}
        self.cache.select(kept, num_rows)
        self.cache.reserve(num_rows, longest + longest // 4)
