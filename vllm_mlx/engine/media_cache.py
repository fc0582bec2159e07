"""Encoder outputs by content hash, under a byte budget: a second question about an image runs no encoder.

Engine thread only. No MLX: a value is anything with `nbytes`. A dropped entry costs another run of the encoder.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


V = TypeVar("V", bound=Sized)


class MediaCache(Generic[V]):
    """Least recently used first out. `num_hits` and `num_misses` count `get`s."""

    def __init__(self, *, budget_bytes: int) -> None:
        if budget_bytes < 0:
            raise ValueError(f"budget_bytes is {budget_bytes}; it cannot be negative")
        self._entries: OrderedDict[bytes, V] = OrderedDict()
        self._budget_bytes = budget_bytes
        self.nbytes = 0
        self.num_hits = 0
        self.num_misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def budget_bytes(self) -> int:
        return self._budget_bytes

    def get(self, content_hash: bytes) -> V | None:
        """The features of this content, marked as just used; None when they must be computed."""
        value = self._entries.get(content_hash)
        if value is None:
            self.num_misses += 1
            return None
        self.num_hits += 1
        self._entries.move_to_end(content_hash)
        return value

    def put(self, content_hash: bytes, value: V) -> None:
        """Keep features, dropping the least recently used beyond the budget. What exceeds it alone is not kept."""
        self.discard(content_hash)
        if value.nbytes > self._budget_bytes:
            return
        self._entries[content_hash] = value
        self.nbytes += value.nbytes
        self._shrink()

    def discard(self, content_hash: bytes) -> None:
        value = self._entries.pop(content_hash, None)
        if value is not None:
            self.nbytes -= value.nbytes

    def resize(self, budget_bytes: int) -> None:
        """Change the budget, for a memory guard; drops what no longer fits."""
        self._budget_bytes = max(0, budget_bytes)
        self._shrink()

    def clear(self) -> None:
        self._entries.clear()
        self.nbytes = 0

    def _shrink(self) -> None:
        while self.nbytes > self._budget_bytes:
            _, dropped = self._entries.popitem(last=False)
            self.nbytes -= dropped.nbytes
