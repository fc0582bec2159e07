"""What the scheduler asks of others: who holds the KV, how large a chunk may be, and the limits in force. No MLX."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from vllm_mlx.engine.prefix_cache import Lease, Segment
from vllm_mlx.engine.sequence import Sequence


class KVStore(Protocol):
    """What the scheduler asks of whoever holds the KV: the runner in production, a fake in simulation."""

    def bytes_for(self, num_tokens: int) -> int:
        """Bytes a row of this many tokens holds."""
        ...

    def open(self, sequence: Sequence, lease: Lease | None) -> None:
        """Give the sequence a row, filled with the leased prefix if there is one."""
        ...

    def segment(self, sequence: Sequence, start: int, end: int) -> Segment:
        """Copy of the row's KV of tokens [start, end), of sliceable layers."""
        ...

    def checkpoint(self, sequence: Sequence, position: int) -> Segment | None:
        """Whole state of the layers that cannot be sliced, if it was kept at `position`.

        It is kept after a chunk that says so, and while decoding at each block boundary, the last two of them.
        """
        ...

    def close(self, sequence: Sequence) -> None:
        """Take the row back."""
        ...


class ChunkSizer(Protocol):
    """Says how many prompt tokens a step may compute beside `num_decoding` rows without stalling their streams."""

    def limit(self, num_decoding: int, context: int) -> int: ...

    def seconds_for(self, num_tokens: int) -> float | None:
        """What computing so many prompt tokens takes; None while it is not known."""
        ...


@dataclass(frozen=True, slots=True)
class FixedChunk:
    """The same chunk always."""

    num_tokens: int
    seconds_per_token: float | None = None

    def limit(self, num_decoding: int, context: int) -> int:
        return self.num_tokens

    def seconds_for(self, num_tokens: int) -> float | None:
        return None if self.seconds_per_token is None else num_tokens * self.seconds_per_token


@dataclass
class Limits:
    """What may change while running: rows by runtime mode and guards, bytes by memory pressure."""

    max_rows: int
    kv_budget_bytes: int
