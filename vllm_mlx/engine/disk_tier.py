"""The second tier of the prefix cache: what was computed survives eviction, preemption and restarts. No MLX.

The MLX thread offers nodes of the radix tree, a few bytes a step, and inserts what comes back (`disk_restores.py`);
files are written and read by two background threads (`disk_jobs.py`), whose news `poll` takes.

    tree node ── pack ──► writer ──► folder ──► reader ── map, check ──► poll ── unpack ──► tree node

Written are prefixes that two prompts used, or that are longer than a bound, in runs of at most `grain` tokens. All of
this is the MLX thread's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from vllm_mlx.engine.background import Background
from vllm_mlx.engine.disk_blocks import Packed, Record
from vllm_mlx.engine.disk_index import DiskIndex
from vllm_mlx.engine.disk_jobs import DiskJobs, Folder
from vllm_mlx.engine.disk_restores import Restores, Unpacker
from vllm_mlx.engine.prefix_cache import Node, PrefixCache, Segment

MIB = 1 << 20


class Codec(Unpacker, Protocol):
    """Turns kept KV into arrays that any thread may hold, and back. MLX thread."""

    def pack(self, parts: Sequence[tuple[Segment, int, int]]) -> Packed | None:
        """Copy of tokens [start, end) of each segment, one after the other; None for what cannot be packed."""
        ...

    def pack_state(self, checkpoint: Segment) -> Packed | None: ...


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


class DiskTier:
    """Listens to `cache`, and writes what is worth it. `restores` is asked for what is on disk already."""

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
        self._codec = codec
        self._clock = clock
        self._index = DiskIndex(
            options.model,
            block_size=cache.block_size,
            grain=options.grain,
            needs_checkpoint=cache.needs_checkpoint,
        )
        self.jobs = DiskJobs(
            folder,
            options.model,
            writer=writer,
            reader=reader,
            clock=clock,
            write_bytes_per_s=options.write_bytes_per_s,
            on_opened=self._opened,
            on_gone=self._forget,
        )
        self.restores = Restores(
            cache,
            self._index,
            codec,
            self.jobs,
            min_gain=options.min_gain,
            max_restores=options.max_restores,
        )
        self._pending: dict[Node, float] = {}
        self._num_swaps = 0
        cache.listener = self
        self.jobs.open()

    def poll(self, max_bytes: int) -> None:
        """Hear what the background has done, and insert up to about `max_bytes` of what came from disk."""
        self.jobs.hear()
        self.restores.insert(max_bytes)

    # ── what the tree tells ─────────────────────────────────────────────────────────────────────────────────────

    def stored(self, node: Node) -> None:
        if node.end >= self.options.min_tokens:
            self._want(node)

    def used(self, node: Node) -> None:
        """A prefix that a second prompt uses is worth writing; what is written was used again."""
        self._want(node)
        if any(n.is_saved for n in node.path()):
            links = self._index.path_links(list(node.path())[::-1])
            self.jobs.touch([record.name for record in self._index.on_the_way(links, node.end)])

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
        return bool(self._pending) and self.jobs.fault is None and self._has_queue_room

    def harvest(self, max_bytes: int, *, is_idle: bool = False) -> int:
        """Copy up to about `max_bytes` of what waits to be written; returns the bytes taken. Between two steps."""
        self.jobs.reopen()
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
        return self.jobs.pending_bytes < self.options.max_pending_bytes

    def save_row(
        self,
        key: tuple[int, ...],
        namespace: str,
        get_segment: Callable[[int, int], Segment],
        checkpoint: Segment | None,
    ) -> bool:
        """Swap: write a row's KV of `key` (whole blocks) that is not on disk yet. False if it cannot be taken now."""
        if self.jobs.fault is not None or not self._has_queue_room:
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
        self._num_swaps += 1
        return True

    def swap_seconds(self, num_bytes: int) -> float:
        """What it would take to write these bytes and read them again."""
        return num_bytes / self.options.write_bytes_per_s + num_bytes / self.options.read_bytes_per_s

    def _write(self, record: Record, packed: Packed | None) -> int:
        """Queue a block; what cannot be packed is passed over."""
        if packed is None:
            return 0
        self._index.add(record)
        self.jobs.put(record, packed)
        return packed.nbytes

    # ── what the folder tells ───────────────────────────────────────────────────────────────────────────────────

    def _opened(self, records: list[Record]) -> None:
        """This is on disk, and nothing else; nodes of the tree may have to be written again."""
        self._index.replace(records)
        self._nothing_is_saved()

    def _forget(self, records: list[Record]) -> None:
        """These are not on disk any more; nodes that were saved in them may be written again."""
        for record in records:
            self._index.remove(record)
        self._nothing_is_saved()

    def _nothing_is_saved(self) -> None:
        for node in self.cache.nodes():
            node.is_saved = False

    # ── the end, and the numbers ────────────────────────────────────────────────────────────────────────────────

    def stop(self) -> None:
        """Hand the hottest prefixes that are not on disk yet to the writer, as far as its queue goes. MLX thread.

        Does not wait: other engines may be running on this thread.
        """
        self.jobs.hurry()
        self.jobs.hear()
        hottest = sorted(self.cache.nodes(), key=lambda n: (n.num_uses, n.last_used), reverse=True)
        self._pending = {n: 0.0 for n in hottest if not n.children or n.checkpoint is not None}
        self.harvest(self.options.max_pending_bytes, is_idle=True)
        self.jobs.stop()

    def join(self, timeout_s: float) -> bool:
        """Wait for what was handed to the writer; False if time ran out. After `stop`; any thread."""
        return self.jobs.join(timeout_s)

    def metrics(self) -> Mapping[str, object]:
        """For `/health/diagnostics`. MLX thread."""
        self.jobs.hear()
        return {"disk_cache": {**self.jobs.metrics(), **self.restores.metrics(), "num_swaps": self._num_swaps}}
