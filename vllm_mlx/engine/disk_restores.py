"""Prefixes on their way from the disk into the tree: what is worth reading, in which order, and where it goes. No MLX.

What the tree has already is held while the rest comes, a run after the other; a run that finds no room ends the restore
and what is behind it is not read. MLX thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from vllm_mlx.engine.disk_blocks import Packed, Record
from vllm_mlx.engine.disk_index import DiskIndex
from vllm_mlx.engine.disk_jobs import DiskJobs
from vllm_mlx.engine.prefix_cache import Lease, PrefixCache, Segment


class Unpacker(Protocol):
    """Turns arrays that came from disk into KV that the cache may keep. MLX thread."""

    def unpack(self, packed: Packed, start: int, end: int) -> Segment:
        """Tokens [start, end) of a packed run, counted from its beginning."""
        ...

    def unpack_state(self, packed: Packed, position: int) -> Segment: ...


@dataclass(eq=False)
class Restore:
    """A prefix on its way. The sequence that wants it waits until `is_done`; the reader fills `arrived`."""

    key: tuple[int, ...]
    namespace: str
    records: list[Record]
    pin: Lease | None = None
    arrived: deque[tuple[Record, Packed]] = field(default_factory=deque)
    state: Packed | None = None
    num_inserted: int = 0
    is_done: bool = False


class Restores:
    """`min_gain`: tokens that the disk must have beyond the tree. At most `max_restores` prefixes come at a time."""

    def __init__(
        self,
        cache: PrefixCache,
        index: DiskIndex,
        codec: Unpacker,
        jobs: DiskJobs,
        *,
        min_gain: int,
        max_restores: int,
    ) -> None:
        self._cache = cache
        self._index = index
        self._codec = codec
        self._jobs = jobs
        self._min_gain = min_gain
        self._max_restores = max_restores
        self._restores: list[Restore] = []
        self._num_restores = 0
        self._num_restored_tokens = 0
        self._restored_bytes = 0

    @property
    def under_way(self) -> tuple[Restore, ...]:
        return tuple(self._restores)

    @property
    def is_busy(self) -> bool:
        """Enough is being read already: what more came would push it out of the tree again."""
        return len(self._restores) >= self._max_restores

    def is_worth_reading(self, key: tuple[int, ...], namespace: str, limit: int) -> bool:
        """The disk has clearly more of `key` than the tree. Hashes the whole of it: ask once."""
        if not self._index:
            return False
        target = self._index.find(key, namespace, limit).target
        in_tree = self._cache.match_length(key, namespace=namespace, usable_only=True)
        return min(target, limit) - in_tree >= self._min_gain

    def begin(self, key: tuple[int, ...], namespace: str, limit: int) -> Restore | None:
        """Start to bring back what the disk has of `key` beyond the tree; None where that is nothing any more.

        At most `limit` tokens are wanted; where every layer can be sliced, a run may end behind it.
        """
        found = self._index.find(key, namespace, limit)
        if found.target == 0:
            return None
        pin = self._cache.pin(key[: found.target], namespace=namespace)
        # The state comes first: without it the runs would be read for nothing.
        states = [found.state] if found.state is not None else []
        records = states + [run for run in found.runs if run.end > pin.num_tokens]
        if not records:  # the tree has it all by now
            self._cache.release(pin)
            return None
        restore = Restore(key[: found.target], namespace, records, pin)
        self._restores.append(restore)
        self._num_restores += 1
        self._jobs.touch([record.name for record in (*found.runs, *states)])
        for record in records:
            self._jobs.read(record, restore)
        return restore

    def insert(self, max_bytes: int) -> None:
        """Put up to about `max_bytes` of what has come into the tree."""
        for restore in list(self._restores):
            while restore.arrived and max_bytes > 0 and not restore.is_done:
                record, packed = restore.arrived.popleft()
                max_bytes -= packed.nbytes
                self._insert(restore, record, packed)
            if restore.is_done:
                self._end(restore)

    def _insert(self, restore: Restore, record: Record, packed: Packed) -> None:
        cache, end = self._cache, min(record.end, len(restore.key))
        self._restored_bytes += packed.nbytes
        if record.kind == "state":
            restore.state = packed
            if record is restore.records[-1]:  # its runs are all in the tree
                self._finish(restore)
            return
        if restore.pin is None or restore.pin.num_tokens < record.start:
            restore.is_done = True  # there was no room for what comes before
            return
        stored = cache.insert(
            restore.key[:end],
            lambda first, last: self._codec.unpack(packed, first - record.start, last - record.start),
            namespace=restore.namespace,
        )
        restore.num_inserted += max(0, stored - restore.pin.num_tokens)
        pin = cache.pin(restore.key[:end], namespace=restore.namespace)
        cache.release(restore.pin)
        restore.pin = pin
        for node in pin.node.path():
            if node.is_saved:
                break
            node.is_saved = True
        if stored < end:
            restore.is_done = True
        elif record is restore.records[-1]:
            self._finish(restore)

    def _finish(self, restore: Restore) -> None:
        if restore.state is not None:
            self._cache.insert(
                restore.key,
                _no_segment,
                checkpoint=self._codec.unpack_state(restore.state, len(restore.key)),
                namespace=restore.namespace,
            )
        restore.is_done = True

    def _end(self, restore: Restore) -> None:
        self._restores.remove(restore)
        self._num_restored_tokens += restore.num_inserted
        restore.arrived.clear()
        if restore.pin is not None:
            self._cache.release(restore.pin)
            restore.pin = None

    def metrics(self) -> Mapping[str, int]:
        return {
            "num_restores": self._num_restores,
            "num_restored_tokens": self._num_restored_tokens,
            "restored_bytes": self._restored_bytes,
        }


def _no_segment(start: int, end: int) -> Segment:
    raise AssertionError("the runs of a restored state are in the tree")
