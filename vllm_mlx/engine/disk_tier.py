"""The second tier of the prefix cache: what was computed survives eviction, preemption and restarts. No MLX.

The MLX thread offers nodes of the radix tree, a few bytes a step, and inserts what comes back; files are written and
read by two background threads, and what these have to say returns through one mailbox, which `poll` empties.

    tree node ── pack ──► writer ──► folder ──► reader ── map, check ──► poll ── unpack ──► tree node

Written are prefixes that two prompts used, or that are longer than a bound, in runs of at most `grain` tokens. A fault
of the disk ends writing (reading goes on while it can), is said once, and is tried again a minute later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from vllm_mlx.engine.background import Background
from vllm_mlx.engine.disk_blocks import DamagedBlock, Packed, Record
from vllm_mlx.engine.disk_folder import FolderFault
from vllm_mlx.engine.disk_index import DiskIndex
from vllm_mlx.engine.prefix_cache import Lease, Node, PrefixCache, Segment

log = logging.getLogger(__name__)

RETRY_S = 60.0
MIB = 1 << 20


class Codec(Protocol):
    """Turns kept KV into arrays that any thread may hold, and back. MLX thread."""

    def pack(self, parts: Sequence[tuple[Segment, int, int]]) -> Packed | None:
        """Copy of tokens [start, end) of each segment, one after the other; None for what cannot be packed."""
        ...

    def unpack(self, packed: Packed, start: int, end: int) -> Segment: ...

    def pack_state(self, checkpoint: Segment) -> Packed | None: ...

    def unpack_state(self, packed: Packed, position: int) -> Segment: ...


class Folder(Protocol):
    """Where blocks live; `disk_folder.BlockFolder`, or a test's. All but `read` are called by the writer alone."""

    @property
    def nbytes(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...

    def open(self, model: str) -> list[Record]: ...

    def close(self) -> None: ...

    def put(self, record: Record, packed: Packed) -> tuple[Record, list[Record]]: ...

    def read(self, record: Record) -> Packed: ...

    def touch(self, names: list[str]) -> None: ...

    def discard(self, name: str) -> None: ...


@dataclass(frozen=True, slots=True)
class TierOptions:
    """`min_tokens`: prefixes this long are written at their first use. `write_bytes_per_s` bounds the background."""

    model: str
    limit_bytes: int
    min_tokens: int = 1024
    grain: int = 256
    min_gain: int = 64
    write_bytes_per_s: float = 200 * MIB
    max_pending_bytes: int = 256 * MIB
    settle_s: float = 1.0
    read_bytes_per_s: float = 400 * MIB
    max_restores: int = 2


@dataclass(eq=False)
class Restore:
    """A prefix on its way from disk into the tree. The sequence that wants it waits until `is_done`."""

    key: tuple[int, ...]
    namespace: str
    records: list[Record]
    pin: Lease | None = None
    arrived: deque[tuple[Record, Packed]] = field(default_factory=deque)
    state: Packed | None = None
    num_inserted: int = 0
    is_done: bool = False


@dataclass
class TierCounters:
    num_restores: int = 0
    num_restored_tokens: int = 0
    restored_bytes: int = 0
    num_written: int = 0
    written_bytes: int = 0
    num_damaged: int = 0
    num_evicted: int = 0
    num_swaps: int = 0


class DiskTier:
    """Owned by the MLX thread; only jobs given to `writer` and `reader` run elsewhere."""

    def __init__(
        self,
        cache: PrefixCache,
        folder: Folder,
        codec: Codec,
        options: TierOptions,
        *,
        writer: Background,
        reader: Background,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.cache = cache
        self.options = options
        self.counters = TierCounters()
        self.fault: str | None = "not open yet"
        self._folder = folder
        self._codec = codec
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._index = DiskIndex(
            options.model,
            block_size=cache.block_size,
            grain=options.grain,
            needs_checkpoint=cache.needs_checkpoint,
        )
        self._in_flight: dict[str, Packed] = {}
        self._in_flight_bytes = 0
        self._pending: dict[Node, float] = {}
        self._restores: list[Restore] = []
        self._retry_at = 0.0
        self._num_faults = 0
        self._said: str | None = None
        self._is_paced = True
        cache.listener = self
        self._open()

    # ── what the tree tells ─────────────────────────────────────────────────────────────────────────────────────

    def stored(self, node: Node) -> None:
        if node.end >= self.options.min_tokens:
            self._want(node)

    def used(self, node: Node) -> None:
        """A prefix that a second prompt uses is worth writing; what is written was used again."""
        self._want(node)
        if any(n.is_saved for n in node.path()):
            links = self._index.path_links(list(node.path())[::-1])
            names = [record.name for record in self._index.on_the_way(links, node.end)]
            self._writer.submit(lambda: self._touch(names))

    def _want(self, node: Node) -> None:
        """Write the path to `node`, once it has stopped growing: larger blocks are fewer files."""
        if node.parent is not None:
            self._pending.pop(node.parent, None)
        if not node.is_saved or node.checkpoint is not None:
            self._pending[node] = self._clock()

    # ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def has_pending(self) -> bool:
        """There is something to write, and room in the writer's queue for it."""
        return bool(self._pending) and self.fault is None and self._has_queue_room

    def harvest(self, max_bytes: int, *, is_idle: bool = False) -> int:
        """Copy up to about `max_bytes` of what waits to be written; returns the bytes taken. Between two steps."""
        if self.fault is not None and self._clock() >= self._retry_at:
            self._open()
        taken = 0
        if self.has_pending:
            settled = self._clock() - self.options.settle_s
            for node in [n for n, since in self._pending.items() if is_idle or since <= settled or n.end % 1024 == 0]:
                took, is_finished = self._save(node, max_bytes - taken)
                taken += took
                if is_finished:
                    self._pending.pop(node, None)
                if taken >= max_bytes or not self._has_queue_room:
                    break
        return taken

    def _save(self, node: Node, max_bytes: int) -> tuple[int, bool]:
        """Write what is missing on the way to `node`, from the root on; the bytes, and whether nothing is left."""
        path = list(node.path())[::-1]
        if not path or path[0].parent is None or path[0].start != 0:
            return 0, True  # evicted meanwhile
        if sum(n.nbytes for n in path) > self.options.limit_bytes // 2:
            return 0, True  # its beginning would be evicted while its end is written
        taken = 0
        links = self._index.path_links(path)
        with_state = [n for n in path if n.checkpoint is not None]
        for run in self._index.missing_runs(links, {node.end, *(n.end for n in with_state)}):
            if taken >= max_bytes or not self._has_queue_room:
                return taken, False
            parts = [
                (n.segment, max(run.start, n.start) - n.start, min(run.end, n.end) - n.start)
                for n in path
                if n.segment is not None and n.start < run.end and run.start < n.end
            ]
            taken += self._write(run, self._codec.pack(parts))
        for n in with_state:
            state = self._index.state_at(links, n.end)
            if state not in self._index and n.checkpoint is not None:
                taken += self._write(state, self._codec.pack_state(n.checkpoint))
        for n in path:
            n.is_saved = True
        return taken, True

    @property
    def _has_queue_room(self) -> bool:
        return self._in_flight_bytes < self.options.max_pending_bytes

    def save_row(
        self,
        key: tuple[int, ...],
        namespace: str,
        get_segment: Callable[[int, int], Segment],
        checkpoint: Segment | None,
    ) -> bool:
        """Swap: write a row's KV of `key` (whole blocks) that is not on disk yet. False if it cannot be taken now."""
        if self.fault is not None or not self._has_queue_room:
            return False
        links = self._index.links(key, namespace)
        runs = list(self._index.missing_runs(links, {len(key)}))
        if runs:
            first = runs[0].start
            segment = get_segment(first, len(key))
            for run in runs:
                self._write(run, self._codec.pack([(segment, run.start - first, run.end - first)]))
        state = self._index.state_at(links, len(key))
        if checkpoint is not None and state not in self._index:
            self._write(state, self._codec.pack_state(checkpoint))
        self.counters.num_swaps += 1
        return True

    def swap_seconds(self, num_bytes: int) -> float:
        """What it would take to write these bytes and read them again."""
        return num_bytes / self.options.write_bytes_per_s + num_bytes / self.options.read_bytes_per_s

    def _write(self, record: Record, packed: Packed | None) -> int:
        """Queue a block; what cannot be packed is passed over."""
        if packed is None:
            return 0
        self._index.add(record)
        self._in_flight[record.name] = packed
        self._in_flight_bytes += packed.nbytes
        self._writer.submit(lambda: self._put(record, packed))
        return packed.nbytes

    # ── reading ─────────────────────────────────────────────────────────────────────────────────────────────────

    def is_worth_reading(self, key: tuple[int, ...], namespace: str, limit: int) -> bool:
        """The disk has clearly more of `key` than the tree. Hashes the whole of it: ask once."""
        if not self._index:
            return False
        target = self._index.find(key, namespace, limit).target
        in_tree = self.cache.match_length(key, namespace=namespace, usable_only=True)
        return min(target, limit) - in_tree >= self.options.min_gain

    @property
    def is_busy(self) -> bool:
        """Enough is being read already: what more came would push it out of the tree again."""
        return len(self._restores) >= self.options.max_restores

    def restore(self, key: tuple[int, ...], namespace: str, limit: int) -> Restore | None:
        """Start to bring back what the disk has of `key` beyond the tree; None where that is nothing any more.

        At most `limit` tokens are wanted; where every layer can be sliced, a run may end behind it.
        """
        found = self._index.find(key, namespace, limit)
        if found.target == 0:
            return None
        pin = self.cache.pin(key[: found.target], namespace=namespace)
        # The state comes first: without it the runs would be read for nothing.
        states = [found.state] if found.state is not None else []
        records = states + [run for run in found.runs if run.end > pin.num_tokens]
        if not records:  # the tree has it all by now
            self.cache.release(pin)
            return None
        restore = Restore(key[: found.target], namespace, records, pin)
        self._restores.append(restore)
        self.counters.num_restores += 1
        names = [record.name for record in (*found.runs, *states)]
        self._writer.submit(lambda: self._touch(names))
        for record in records:
            packed = self._in_flight.get(record.name)
            self._reader.submit(partial(self._read, restore, record, packed))
        return restore

    def poll(self, max_bytes: int) -> None:
        """Hear what the background has done, and insert up to about `max_bytes` of what came from disk."""
        self._hear()
        for restore in list(self._restores):
            while restore.arrived and max_bytes > 0 and not restore.is_done:
                record, packed = restore.arrived.popleft()
                max_bytes -= packed.nbytes
                self._insert(restore, record, packed)
            if restore.is_done:
                self._end(restore)

    def wait(self, timeout_s: float) -> None:
        """Until the background has something to say. For a step that has nothing else to do."""
        self._writer.wait(timeout_s)

    @property
    def is_restoring(self) -> bool:
        return bool(self._restores)

    def _insert(self, restore: Restore, record: Record, packed: Packed) -> None:
        cache, end = self.cache, min(record.end, len(restore.key))
        self.counters.restored_bytes += packed.nbytes
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
            self.cache.insert(
                restore.key,
                _no_segment,
                checkpoint=self._codec.unpack_state(restore.state, len(restore.key)),
                namespace=restore.namespace,
            )
        restore.is_done = True

    def _end(self, restore: Restore) -> None:
        self._restores.remove(restore)
        self.counters.num_restored_tokens += restore.num_inserted
        restore.arrived.clear()
        if restore.pin is not None:
            self.cache.release(restore.pin)
            restore.pin = None

    def _forget(self, records: list[Record]) -> None:
        """These are not on disk any more; nodes that were saved in them may be written again."""
        for record in records:
            self._index.remove(record)
        for node in self.cache.nodes():
            node.is_saved = False

    # ── on the background threads ───────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        self._retry_at = self._clock() + RETRY_S
        self._writer.submit(self._open_folder)

    def _open_folder(self) -> None:
        try:
            records = self._folder.open(self.options.model)
        except FolderFault as error:
            self._report(str(error))
            return
        num_faults = self._num_faults
        self._inbox.put(lambda: self._opened(records, num_faults))

    def _put(self, record: Record, packed: Packed) -> None:
        try:
            if self.fault is not None:
                raise FolderFault(self.fault)
            written, evicted = self._folder.put(record, packed)
        except FolderFault as error:
            self._inbox.put(lambda: self._landed(record, packed, is_written=False))
            self._report(str(error))
            return
        self._inbox.put(lambda: self._landed(written, packed, is_written=True))
        if evicted:
            self._inbox.put(lambda: self._evicted(evicted))
        if self._is_paced:
            self._writer.pause(packed.nbytes / self.options.write_bytes_per_s)

    def _read(self, restore: Restore, record: Record, packed: Packed | None) -> None:
        if restore.is_done:
            return
        try:
            found = packed if packed is not None else self._folder.read(record)
        except (DamagedBlock, OSError) as error:
            # A file that is not there any more was evicted by another model of this process, or somebody deleted it.
            detail = None if isinstance(error, FileNotFoundError) else str(error)
            restore.is_done = True
            self._inbox.put(lambda: self._lost(record, detail))
            return
        restore.arrived.append((record, found))
        self._writer.notify()

    def _touch(self, names: list[str]) -> None:
        if self.fault is None:
            try:
                self._folder.touch(names)
            except FolderFault as error:
                self._report(str(error))

    def _discard(self, record: Record) -> None:
        try:
            self._folder.discard(record.name)
        except FolderFault as error:
            self._report(str(error))

    def _report(self, fault: str) -> None:
        """Writer thread: from here on nothing is written until the folder opens again."""
        self._folder.close()
        self._num_faults += 1
        self.fault = fault
        self._inbox.put(lambda: self._failed(fault))

    # ── what the background says ────────────────────────────────────────────────────────────────────────────────

    def _opened(self, records: list[Record], num_faults: int) -> None:
        if num_faults != self._num_faults:
            return  # it failed again before this was heard
        self._index.replace(records)
        for node in self.cache.nodes():
            node.is_saved = False
        if self._said is not None:
            log.info("the disk cache works again")
            self._said = None
        self.fault = None

    def _failed(self, fault: str) -> None:
        self._retry_at = self._clock() + RETRY_S
        if fault != self._said:
            log.warning("the disk cache is not used for now: %s", fault)
            self._said = fault

    def _landed(self, record: Record, packed: Packed, *, is_written: bool) -> None:
        self._in_flight.pop(record.name, None)
        self._in_flight_bytes -= packed.nbytes
        if is_written:
            self.counters.num_written += 1
            self.counters.written_bytes += record.nbytes
        else:
            self._forget([record])

    def _evicted(self, records: list[Record]) -> None:
        self.counters.num_evicted += len(records)
        self._forget(records)

    def _lost(self, record: Record, detail: str | None) -> None:
        if detail is not None:
            log.warning("a block of the disk cache is passed over: %s", detail)
            self.counters.num_damaged += 1
        self._forget([record])
        self._writer.submit(lambda: self._discard(record))

    # ── the end, and the numbers ────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Hand the hottest prefixes that are not on disk yet to the writer, as far as its queue goes. MLX thread.

        Does not wait: other engines may be running on this thread.
        """
        self._is_paced = False
        self._hear()
        hottest = sorted(self.cache.nodes(), key=lambda n: (n.num_uses, n.last_used), reverse=True)
        self._pending = {n: 0.0 for n in hottest if not n.children or n.checkpoint is not None}
        self.harvest(self.options.max_pending_bytes, is_idle=True)
        self._reader.close(0.0)
        self._writer.submit(self._folder.close)

    def join(self, timeout_s: float) -> bool:
        """Wait for what was handed to the writer; False if time ran out. After `stop`; any thread."""
        return self._writer.close(timeout_s)

    def _hear(self) -> None:
        """Do what the background asked for."""
        while not self._inbox.empty():
            self._inbox.get()()

    def metrics(self) -> Mapping[str, object]:
        """For `/health/diagnostics`. MLX thread."""
        self._hear()
        c = self.counters
        return {
            "disk_cache": {
                "fault": self.fault,
                "bytes": self._folder.nbytes,
                "num_blocks": self._folder.num_blocks,
                "pending_bytes": self._in_flight_bytes,
                "num_restores": c.num_restores,
                "num_restored_tokens": c.num_restored_tokens,
                "restored_bytes": c.restored_bytes,
                "num_written": c.num_written,
                "written_bytes": c.written_bytes,
                "num_damaged": c.num_damaged,
                "num_evicted": c.num_evicted,
                "num_swaps": c.num_swaps,
            }
        }


def _no_segment(start: int, end: int) -> Segment:
    raise AssertionError("the runs of a restored state are in the tree")
