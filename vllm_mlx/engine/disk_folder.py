"""A folder of blocks with an index, bounded in bytes: add, touch, evict, rebuild. No MLX; any thread.

    DIR/lock            held while a server uses the folder; a second server goes without
    DIR/index.sqlite3   what is there and when it was last used; made anew from the files when it is lost or damaged
    DIR/blocks/ab/...   the blocks (disk_blocks.py)

The files are the truth: a file without a row is taken in, a row without a file is dropped. Blocks of other models are
counted and evicted like any other. A fault of the disk is a `FolderFault` with a sentence.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from vllm_mlx.engine import disk_blocks
from vllm_mlx.engine.disk_blocks import SUFFIX, DamagedBlock, Packed, Record
from vllm_mlx.errors import VllmMlxError

INDEX_VERSION = 2
_TABLE = """
CREATE TABLE IF NOT EXISTS blocks (
    name TEXT PRIMARY KEY, model TEXT NOT NULL, kind TEXT NOT NULL, start INTEGER NOT NULL, "end" INTEGER NOT NULL,
    start_key BLOB NOT NULL, end_key BLOB NOT NULL, nbytes INTEGER NOT NULL, links BLOB NOT NULL,
    last_used REAL NOT NULL
)
"""
_COLUMNS = 'model, kind, start, "end", start_key, end_key, nbytes, links'


class FolderFault(VllmMlxError):
    """The folder cannot be used now; the message says why."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a folder holds of one model."""

    model: str
    num_blocks: int
    num_states: int
    nbytes: int
    last_used: float


class BlockFolder:
    """`limit_bytes` bounds all files together; the least recently used go first, ends of conversations before stems.

    Several models of one process may open it; each closes it once.
    """

    def __init__(self, path: Path, *, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.nbytes = 0
        self.num_blocks = 0
        self._mutex = threading.RLock()
        self._num_open = 0
        self._lock: int | None = None
        self._db: sqlite3.Connection | None = None

    # ── opening and closing ─────────────────────────────────────────────────────────────────────────────────────

    def open(self, model: str) -> list[Record]:
        """Take the folder, mend the index, and return what it holds of `model`."""
        with self._guard():
            if not self._num_open:
                self._open()
            self._num_open += 1
            rows = self._index.execute(f"SELECT {_COLUMNS} FROM blocks WHERE model = ?", (model,))
            return [Record(*row) for row in rows]

    def _open(self) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._db = self._open_index()
            self._reconcile()
            self._evict()
        except (OSError, sqlite3.Error, FolderFault):
            self._close()
            raise

    def close(self) -> None:
        """Let go of the folder; what is written stays. Closing what is not open does nothing."""
        with self._mutex:
            self._num_open = max(0, self._num_open - 1)
            if not self._num_open:
                self._close()

    def _close(self) -> None:
        if self._db is not None:
            with contextlib.suppress(sqlite3.Error):
                self._db.close()
            self._db = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take_lock(self) -> None:
        if self._lock is not None:
            return
        handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FolderFault(f"{self.path} is used by another server; give each server a folder of its own.") from None
        self._lock = handle

    def _check_lock(self) -> None:
        """A folder that was deleted, or moved away, is not ours any more even if another stands in its place."""
        try:
            is_ours = self._lock is not None and os.path.samestat(os.stat(self.path / "lock"), os.fstat(self._lock))
        except FileNotFoundError:
            is_ours = False
        if not is_ours:
            raise FolderFault(f"{self.path} was deleted or replaced while it was used.")

    def _open_index(self) -> sqlite3.Connection:
        file = self.path / "index.sqlite3"
        try:
            return _connect(file)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # the disk, not the contents
            for part in self.path.glob("index.sqlite3*"):
                part.unlink(missing_ok=True)
            return _connect(file)

    def _reconcile(self) -> None:
        """Make the index agree with the files; remove what a dying process left half written."""
        files: dict[str, Path] = {}
        for file in (self.path / "blocks").glob("*/*"):
            if file.suffix == SUFFIX:
                files[file.stem] = file
            else:
                file.unlink(missing_ok=True)
        known = {name for (name,) in self._index.execute("SELECT name FROM blocks")}
        with self._index:
            self._index.executemany("DELETE FROM blocks WHERE name = ?", [(name,) for name in known - set(files)])
            for name in set(files) - known:
                try:
                    record = disk_blocks.read_record(files[name])
                    self._insert(record, files[name].stat().st_mtime)
                except DamagedBlock:
                    files[name].unlink(missing_ok=True)
        count, total = self._index.execute("SELECT count(*), coalesce(sum(nbytes), 0) FROM blocks").fetchone()
        self.num_blocks, self.nbytes = count, total

    # ── blocks ──────────────────────────────────────────────────────────────────────────────────────────────────

    def put(self, record: Record, packed: Packed) -> tuple[Record, list[Record]]:
        """Write a block; returns it with its size, and what had to go to make room for it."""
        with self._guard():
            self._check_lock()
            self._forget(record.name)
            written = replace(record, nbytes=disk_blocks.write(self.path, record, packed))
            with self._index:
                self._insert(written, time.time())
            self.nbytes += written.nbytes
            self.num_blocks += 1
            return written, self._evict()

    def read(self, record: Record) -> Packed:
        """Contents of a block. Any thread. Raises DamagedBlock and OSError."""
        return disk_blocks.read(self.path, record)

    def touch(self, names: Iterable[str]) -> None:
        """These were used just now."""
        with self._guard(), self._index:
            now = time.time()
            self._index.executemany("UPDATE blocks SET last_used = ? WHERE name = ?", [(now, name) for name in names])

    def discard(self, name: str) -> None:
        """Drop a block that is damaged, or whose file is gone."""
        with self._guard():
            disk_blocks.path_of(self.path, name).unlink(missing_ok=True)
            self._forget(name)

    def _forget(self, name: str) -> None:
        row = self._index.execute("SELECT nbytes FROM blocks WHERE name = ?", (name,)).fetchone()
        if row is not None:
            with self._index:
                self._index.execute("DELETE FROM blocks WHERE name = ?", (name,))
            self.nbytes -= row[0]
            self.num_blocks -= 1

    def _evict(self) -> list[Record]:
        """Bring the bytes under the limit; returns what went."""
        gone: list[Record] = []
        while self.nbytes > self.limit_bytes:
            rows = self._index.execute(
                f'SELECT name, {_COLUMNS} FROM blocks ORDER BY last_used, "end" DESC LIMIT 32'
            ).fetchall()
            if not rows:
                break
            with self._index:
                for name, *fields in rows:
                    if self.nbytes <= self.limit_bytes:
                        break
                    record = Record(*fields)
                    disk_blocks.path_of(self.path, name).unlink(missing_ok=True)
                    self._index.execute("DELETE FROM blocks WHERE name = ?", (name,))
                    self.nbytes -= record.nbytes
                    self.num_blocks -= 1
                    gone.append(record)
        return gone

    def _insert(self, record: Record, last_used: float) -> None:
        r = record
        self._index.execute(
            "INSERT OR REPLACE INTO blocks VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (r.name, r.model, r.kind, r.start, r.end, r.start_key, r.end_key, r.nbytes, r.links, last_used),
        )

    @property
    def _index(self) -> sqlite3.Connection:
        if self._db is None:
            raise FolderFault(f"{self.path} is not open.")
        return self._db

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """One thread at a time, and whatever the disk does wrong as one sentence."""
        with self._mutex:
            try:
                yield
            except OSError as error:
                raise FolderFault(f"{self.path}: {error.strerror or error}.") from error
            except sqlite3.Error as error:
                raise FolderFault(f"{self.path}: the index cannot be used ({error}).") from error

    # ── for `vllm-mlx cache` ────────────────────────────────────────────────────────────────────────────────────

    def usage(self) -> list[Usage]:
        """Per model, the largest first. The folder must be open."""
        rows = self._index.execute(
            "SELECT model, count(*), sum(kind = 'state'), sum(nbytes), max(last_used) FROM blocks GROUP BY model"
        )
        return sorted((Usage(*row) for row in rows), key=lambda usage: -usage.nbytes)

    def clear(self, model: str | None = None) -> int:
        """Drop every block, or every block of `model`; returns the bytes freed."""
        with self._guard():
            before = self.nbytes
            query = "SELECT name FROM blocks" + (" WHERE model = ?" if model is not None else "")
            for (name,) in self._index.execute(query, () if model is None else (model,)).fetchall():
                self.discard(name)
            return before - self.nbytes

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Names of blocks that cannot be trusted, with the reason. Reads every file."""
        for name, *fields in self._index.execute(f"SELECT name, {_COLUMNS} FROM blocks").fetchall():
            try:
                self.read(Record(*fields))
            except (DamagedBlock, OSError) as error:
                yield name, str(error)


def _connect(file: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(file, timeout=5.0, check_same_thread=False)
    try:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version not in (0, INDEX_VERSION):
            raise sqlite3.DatabaseError(f"index version {version}")
        connection.execute(_TABLE)
        (word,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if word != "ok":
            raise sqlite3.DatabaseError(word)
        connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")
        connection.commit()
    except sqlite3.Error:
        connection.close()
        raise
    return connection


_shared: dict[Path, BlockFolder] = {}


def shared_folder(path: Path, *, limit_bytes: int) -> BlockFolder:
    """The process's one object for a folder: its models share the folder's bound, its index and its lock."""
    return _shared.setdefault(path.resolve(), BlockFolder(path, limit_bytes=limit_bytes))
