"""Earlier responses, for `previous_response_id` and retrieval: bounded; the least recently used are forgotten first.

SQLite either way: in memory, or in the file of --response-store, where they survive a restart. Each entry holds its own
turn only and names the one before, so a long conversation is held once. asyncio thread; each call is a few short
statements without a wait for the disk (WAL, synchronous=NORMAL).
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from vllm_mlx.errors import SettingsError

MAX_RESPONSES = 1000
MAX_BYTES = 64 * 2**20
MAX_FILE_BYTES = 1024 * 2**20
_VERSION = 1
_TABLE = """
CREATE TABLE responses (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, previous_id TEXT, input_items BLOB NOT NULL, response BLOB NOT NULL,
    num_bytes INTEGER NOT NULL, used INTEGER NOT NULL) WITHOUT ROWID;
CREATE INDEX responses_used ON responses (used);
"""


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """One turn: what was sent, and the answer, both as JSON. Only its `owner` may see it."""

    id: str
    owner: str
    previous_id: str | None
    input_items: bytes
    response: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.input_items) + len(self.response)

    def read_response(self) -> dict[str, Any]:
        return orjson.loads(self.response)

    def read_input(self) -> list[dict[str, Any]]:
        return orjson.loads(self.input_items)


class ResponseStore:
    """Using a response refreshes its ancestors after it: of a conversation that is used no more, the newest turns are
    forgotten first, and those before them can still be continued."""

    def __init__(self, path: str | None = None, *, max_responses: int = MAX_RESPONSES, max_bytes: int = 0) -> None:
        """SettingsError when the file cannot be used. `max_bytes` 0: 64 MiB in memory, 1 GiB in a file."""
        self._max_responses = max_responses
        self._max_bytes = max_bytes or (MAX_FILE_BYTES if path else MAX_BYTES)
        try:
            self._db = _open(path)
            self._used = self._scalar("SELECT coalesce(max(used), 0) FROM responses")
            self.num_bytes = self._scalar("SELECT coalesce(sum(num_bytes), 0) FROM responses")
            self._num_entries = self._scalar("SELECT count(*) FROM responses")
        except (sqlite3.Error, OSError) as error:
            raise SettingsError(f"--response-store {path} cannot be used: {error}.") from error

    def __len__(self) -> int:
        return self._num_entries

    def close(self) -> None:
        self._db.close()

    def put(self, entry: StoredResponse) -> None:
        """Keep a response. One that is larger than the whole store is not kept."""
        if entry.num_bytes > self._max_bytes or not self._max_responses:
            return
        with self._db:
            self._remove(entry.id)
            self._db.execute(
                "INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?, 0)",
                (entry.id, entry.owner, entry.previous_id, entry.input_items, entry.response, entry.num_bytes),
            )
            self._num_entries += 1
            self.num_bytes += entry.num_bytes
            self._refresh([e.id for e in self._ancestors(entry.id, entry.owner)[0]])
            while self._num_entries > self._max_responses or self.num_bytes > self._max_bytes:
                self._remove(self._db.execute("SELECT id FROM responses ORDER BY used LIMIT 1").fetchone()[0])

    def get(self, id: str, owner: str) -> StoredResponse | None:
        with self._db:
            if (entry := self._find(id, owner)) is not None:
                self._refresh([id])
        return entry

    def delete(self, id: str, owner: str) -> bool:
        """Forget one response; those after it can then not be continued."""
        if self._find(id, owner) is None:
            return False
        with self._db:
            self._remove(id)
        return True

    def chain(self, id: str, owner: str) -> list[StoredResponse] | None:
        """The conversation up to this response, oldest first; None when any part of it is gone."""
        found, is_whole = self._ancestors(id, owner)
        if not is_whole:
            return None
        with self._db:
            self._refresh([entry.id for entry in found])
        return found[::-1]

    def _ancestors(self, id: str, owner: str) -> tuple[list[StoredResponse], bool]:
        """The response and those before it, newest first, and whether none is missing."""
        found: list[StoredResponse] = []
        next_id: str | None = id
        while next_id is not None:
            if (entry := self._find(next_id, owner)) is None:
                return found, False
            found.append(entry)
            next_id = entry.previous_id
        return found, True

    def _find(self, id: str, owner: str) -> StoredResponse | None:
        columns = "id, owner, previous_id, input_items, response"
        row = self._db.execute(
            f"SELECT {columns} FROM responses WHERE id = ? AND owner = ?", (id, owner)
        ).fetchone()
        return StoredResponse(*row) if row else None

    def _refresh(self, ids: list[str]) -> None:
        """In this order: the last one is then the one that was used last."""
        for id in ids:
            self._used += 1
            self._db.execute("UPDATE responses SET used = ? WHERE id = ?", (self._used, id))

    def _remove(self, id: str) -> None:
        row = self._db.execute("DELETE FROM responses WHERE id = ? RETURNING num_bytes", (id,)).fetchone()
        if row:
            self._num_entries -= 1
            self.num_bytes -= row[0]

    def _scalar(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])


def _open(path: str | None) -> sqlite3.Connection:
    if path is not None:
        Path(path).expanduser().parent.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(str(Path(path).expanduser()) if path else ":memory:", check_same_thread=False, timeout=1)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute("PRAGMA synchronous = NORMAL")
    version = db.execute("PRAGMA user_version").fetchone()[0]
    if version == 0:
        db.executescript(_TABLE + f"PRAGMA user_version = {_VERSION};")
    elif version != _VERSION:
        raise OSError(f"it was written by another version of this program (format {version}, not {_VERSION})")
    return db
