"""Claims about what is kept of earlier responses, in memory and in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.api.openai.response_store import ResponseStore, StoredResponse
from vllm_mlx.errors import SettingsError


def entry(id: str, previous: str | None = None, *, owner: str = "", size: int = 10) -> StoredResponse:
    return StoredResponse(id, owner, previous, b"[]", b"{" + b" " * (size - 4) + b"}")


@pytest.fixture(params=["memory", "file"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str | None:
    return str(tmp_path / "responses" / "kept.db") if request.param == "file" else None


def test_a_chain_is_the_conversation_oldest_first(path):
    store = ResponseStore(path)
    for id, previous in (("a", None), ("b", "a"), ("c", "b"), ("x", None)):
        store.put(entry(id, previous))
    assert [e.id for e in store.chain("c", "") or ()] == ["a", "b", "c"]
    assert store.chain("nobody", "") is None
    assert store.delete("b", "") and store.chain("c", "") is None
    assert store.get("c", "") is not None and not store.delete("b", "")


def test_the_newest_turns_of_what_is_used_least_are_forgotten_first(path):
    store = ResponseStore(path, max_responses=4)
    for id, previous in (("old1", None), ("old2", "old1"), ("new1", None), ("new2", "new1")):
        store.put(entry(id, previous))
    store.put(entry("new3", "new2"))
    assert len(store) == 4 and store.get("old2", "") is None
    assert [e.id for e in store.chain("old1", "") or ()] == ["old1"]
    assert [e.id for e in store.chain("new3", "") or ()] == ["new1", "new2", "new3"]


def test_bytes_are_bounded_and_one_that_is_too_large_is_not_kept(path):
    store = ResponseStore(path, max_bytes=100)
    for i in range(20):
        store.put(entry(str(i), size=30))
        assert store.num_bytes <= 100
    store.put(entry("large", size=101))
    assert len(store) == 3 and store.get("large", "") is None
    assert ResponseStore(max_responses=0).put(entry("a")) is None


def test_an_entry_belongs_to_its_owner(path):
    store = ResponseStore(path)
    store.put(entry("a", owner="key:a"))
    assert store.get("a", "key:b") is None and not store.delete("a", "key:b") and store.chain("a", "") is None
    assert store.get("a", "key:a") is not None


def test_putting_again_replaces(path):
    store = ResponseStore(path)
    store.put(entry("a", size=30))
    store.put(entry("a", size=50))
    assert len(store) == 1 and store.num_bytes == 50


def test_a_file_survives_a_restart(tmp_path):
    path = str(tmp_path / "kept.db")
    first = ResponseStore(path)
    first.put(entry("a", size=30))
    first.put(entry("b", "a", size=30))
    first.close()
    second = ResponseStore(path, max_responses=2)
    assert len(second) == 2 and second.num_bytes == 60
    assert [e.id for e in second.chain("b", "") or ()] == ["a", "b"]
    second.put(entry("c"))
    assert len(second) == 2


def test_a_file_that_is_no_store_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "other"
    path.write_text("not a database, but long enough to be looked at " * 10)
    with pytest.raises(SettingsError, match="--response-store .* cannot be used"):
        ResponseStore(str(path))
