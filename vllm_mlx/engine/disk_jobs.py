"""The disk tier's folder on two background threads: what is asked of it, and what became of that. No MLX.

Methods without an underscore are the MLX thread's, `join` anybody's. Jobs run on the writer, reading on the reader, and
what these have to say waits in one mailbox, which `hear` empties. A fault of the disk ends writing (reading goes on
while it can), is said once, and is tried again a minute later.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from queue import SimpleQueue
from typing import Protocol

from vllm_mlx.engine.background import Background
from vllm_mlx.engine.disk_blocks import DamagedBlock, Packed, Record
from vllm_mlx.engine.disk_folder import FolderFault

log = logging.getLogger(__name__)

RETRY_S = 60.0


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


class Destination(Protocol):
    """Where blocks that were read arrive. `is_done`: no more are wanted; the reader says so when one is lost."""

    arrived: deque[tuple[Record, Packed]]
    is_done: bool


class DiskJobs:
    """Who asks is told in `hear` when the folder has opened, with what is in it, and which blocks are gone.

    Gone is what could not be written, was evicted, or was damaged. `fault` says why nothing is written now.
    """

    def __init__(
        self,
        folder: Folder,
        model: str,
        *,
        writer: Background,
        reader: Background,
        clock: Callable[[], float],
        write_bytes_per_s: float,
        on_opened: Callable[[list[Record]], None],
        on_gone: Callable[[list[Record]], None],
    ) -> None:
        self.fault: str | None = "not open yet"
        self._folder = folder
        self._model = model
        self._writer = writer
        self._reader = reader
        self._clock = clock
        self._write_bytes_per_s = write_bytes_per_s
        self._on_opened = on_opened
        self._on_gone = on_gone
        self._inbox: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._in_flight: dict[str, Packed] = {}
        self._in_flight_bytes = 0
        self._is_paced = True
        self._retry_at = 0.0
        self._num_faults = 0
        self._said: str | None = None
        self._num_written = 0
        self._written_bytes = 0
        self._num_damaged = 0
        self._num_evicted = 0

    # ── what is asked ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def pending_bytes(self) -> int:
        """Bytes of blocks on their way to the disk, which memory holds meanwhile."""
        return self._in_flight_bytes

    def open(self) -> None:
        self._retry_at = self._clock() + RETRY_S
        self._writer.submit(self._open)

    def reopen(self) -> None:
        """After a fault, once it is time."""
        if self.fault is not None and self._clock() >= self._retry_at:
            self.open()

    def put(self, record: Record, packed: Packed) -> None:
        self._in_flight[record.name] = packed
        self._in_flight_bytes += packed.nbytes
        self._writer.submit(lambda: self._put(record, packed))

    def read(self, record: Record, destination: Destination) -> None:
        """Bring a block, from memory where it is still on its way to the disk."""
        packed = self._in_flight.get(record.name)
        self._reader.submit(partial(self._read, record, packed, destination))

    def touch(self, names: list[str]) -> None:
        """These were used just now."""
        self._writer.submit(lambda: self._touch(names))

    def hear(self) -> None:
        """Take what the background has to say, and pass it on."""
        while not self._inbox.empty():
            self._inbox.get()()

    def wait(self, timeout_s: float) -> None:
        """Until the background has something to say, or the time has passed."""
        self._writer.wait(timeout_s)

    def hurry(self) -> None:
        """From here on write as fast as the disk can."""
        self._is_paced = False

    def stop(self) -> None:
        """Read no more, and let go of the folder when all is written. Does not wait."""
        self._reader.close(0.0)
        self._writer.submit(self._folder.close)

    def join(self, timeout_s: float) -> bool:
        """Wait for what was asked of the writer; False if time ran out. After `stop`; any thread."""
        return self._writer.close(timeout_s)

    def metrics(self) -> Mapping[str, object]:
        return {
            "fault": self.fault,
            "bytes": self._folder.nbytes,
            "num_blocks": self._folder.num_blocks,
            "pending_bytes": self._in_flight_bytes,
            "num_written": self._num_written,
            "written_bytes": self._written_bytes,
            "num_damaged": self._num_damaged,
            "num_evicted": self._num_evicted,
        }

    # ── on the background threads ───────────────────────────────────────────────────────────────────────────────

    def _open(self) -> None:
        try:
            records = self._folder.open(self._model)
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
            self._writer.pause(packed.nbytes / self._write_bytes_per_s)

    def _read(self, record: Record, packed: Packed | None, destination: Destination) -> None:
        if destination.is_done:
            return
        try:
            found = packed if packed is not None else self._folder.read(record)
        except (DamagedBlock, OSError) as error:
            # A file that is not there any more was evicted by another model of this process, or somebody deleted it.
            detail = None if isinstance(error, FileNotFoundError) else str(error)
            destination.is_done = True
            self._inbox.put(lambda: self._lost(record, detail))
            return
        destination.arrived.append((record, found))
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

    # ── what became of it, in `hear` ────────────────────────────────────────────────────────────────────────────

    def _opened(self, records: list[Record], num_faults: int) -> None:
        if num_faults != self._num_faults:
            return  # it failed again before this was heard
        self._on_opened(records)
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
            self._num_written += 1
            self._written_bytes += record.nbytes
        else:
            self._on_gone([record])

    def _evicted(self, records: list[Record]) -> None:
        self._num_evicted += len(records)
        self._on_gone(records)

    def _lost(self, record: Record, detail: str | None) -> None:
        if detail is not None:
            log.warning("a block of the disk cache is passed over: %s", detail)
            self._num_damaged += 1
        self._on_gone([record])
        self._writer.submit(lambda: self._discard(record))
