"""Blocks on a real disk: whole or not there, found again, bounded, and never in the way of serving."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from vllm_mlx.engine import disk_blocks
from vllm_mlx.engine.disk_blocks import DamagedBlock, Packed, Record, chain, root_key
from vllm_mlx.engine.disk_folder import BlockFolder, FolderFault

BLOCK = 16


def packed(seed: int, size: int = 1000) -> Packed:
    rng = np.random.default_rng(seed)
    return Packed((rng.normal(size=(1, 2, 4, size // 8)).astype(np.float32), np.arange(seed + 1)), f"[{seed}]")


def record(seed: int, *, model: str = "m", kind: str = "kv") -> Record:
    start = chain(root_key(""), range(seed * 100, seed * 100 + BLOCK), BLOCK)[-1]
    end = chain(start, range(BLOCK), BLOCK)[-1]
    return Record(model, kind, BLOCK, 2 * BLOCK, start, end)


def opened(path: Path, limit: int = 1 << 30, model: str = "m") -> tuple[BlockFolder, list[Record]]:
    folder = BlockFolder(path, limit_bytes=limit)
    return folder, folder.open(model)


def same(a: Packed, b: Packed) -> bool:
    return a.structure == b.structure and all(np.array_equal(x, y) for x, y in zip(a.arrays, b.arrays, strict=True))


def test_a_block_comes_back_as_it_was_after_the_folder_is_opened_again(tmp_path: Path) -> None:
    folder, found = opened(tmp_path)
    assert found == []
    folder.put(record(1), packed(1))
    folder.put(record(2, kind="state"), packed(2))
    folder.put(record(3, model="other"), packed(3))
    folder.close()
    folder, found = opened(tmp_path)
    assert {r.name for r in found} == {record(1).name, record(2, kind="state").name}
    assert folder.num_blocks == 3 and folder.nbytes > sum(r.nbytes for r in found)
    assert same(folder.read(record(1)), packed(1))


def test_everything_that_makes_kv_differ_is_in_the_name() -> None:
    names = {record(1).name, record(2).name, record(1, model="n").name, record(1, kind="state").name}
    assert len(names) == 4
    assert chain(root_key("a"), range(BLOCK), BLOCK) != chain(root_key("b"), range(BLOCK), BLOCK)


def test_a_chain_depends_on_every_token_before() -> None:
    links = chain(root_key(""), [1] * BLOCK + [2] * BLOCK, BLOCK)
    assert links[1] != chain(root_key(""), [3] + [1] * (BLOCK - 1) + [2] * BLOCK, BLOCK)[1]
    assert links == chain(root_key(""), [1] * BLOCK + [2] * BLOCK + [7], BLOCK)
    assert chain(root_key(""), [-5, 1 << 61] * 8, BLOCK) != chain(root_key(""), [-6, 1 << 61] * 8, BLOCK)


@pytest.mark.parametrize("damage", ["truncate", "flip", "header", "empty", "swap"])
def test_a_damaged_block_is_never_served(damage: str, tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    folder.put(record(1), packed(1))
    folder.put(record(2), packed(2))
    file = disk_blocks.path_of(tmp_path, record(1).name)
    content = bytearray(file.read_bytes())
    match damage:
        case "truncate":
            content = content[:-7]
        case "flip":
            content[-100] ^= 1
        case "header":
            content[0:8] = b"\xff" * 8
        case "empty":
            content = bytearray()
        case "swap":
            content = bytearray(disk_blocks.path_of(tmp_path, record(2).name).read_bytes())
    file.write_bytes(content)
    with pytest.raises(DamagedBlock):
        folder.read(record(1))
    assert [name for name, _ in folder.damaged()] == [record(1).name]
    folder.discard(record(1).name)
    assert list(folder.damaged()) == [] and folder.num_blocks == 1


def test_the_least_recently_used_go_first_whatever_their_model(tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    size = folder.put(record(1, model="old"), packed(1))[0].nbytes
    folder.put(record(2), packed(1))
    folder.put(record(3), packed(1))
    folder.limit_bytes = 3 * size + 100
    folder.touch([record(2).name])
    _, gone = folder.put(record(4), packed(1))
    assert [r.model for r in gone] == ["old"]
    _, gone = folder.put(record(5), packed(1))
    assert [r.name for r in gone] == [record(3).name]
    assert folder.nbytes <= folder.limit_bytes and not disk_blocks.path_of(tmp_path, record(3).name).exists()


def test_writing_a_block_twice_counts_it_once(tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    folder.put(record(1), packed(1))
    before = folder.nbytes
    folder.put(record(1), packed(1))
    assert folder.nbytes == before and folder.num_blocks == 1


@pytest.mark.parametrize("damage", ["gone", "garbage", "other version"])
def test_a_lost_index_is_made_anew_from_the_files(damage: str, tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    folder.put(record(1), packed(1))
    folder.close()
    for file in tmp_path.glob("index.sqlite3*"):
        file.unlink()
    if damage == "garbage":
        (tmp_path / "index.sqlite3").write_bytes(b"no database" * 1000)
    if damage == "other version":
        import sqlite3

        with sqlite3.connect(tmp_path / "index.sqlite3") as db:
            db.execute("PRAGMA user_version = 99")
    folder, found = opened(tmp_path)
    assert [r.name for r in found] == [record(1).name] and same(folder.read(found[0]), packed(1))


def test_leftovers_of_a_dying_process_are_removed(tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    folder.put(record(1), packed(1))
    folder.close()
    torn = disk_blocks.path_of(tmp_path, record(2).name)
    torn.parent.mkdir(exist_ok=True)
    torn.write_bytes(b"half")
    (torn.parent / "abc.123.tmp").write_bytes(b"half")
    folder, found = opened(tmp_path)
    assert [r.name for r in found] == [record(1).name]
    assert not torn.exists() and not list(tmp_path.glob("blocks/*/*.tmp"))


def test_a_second_server_is_told_to_take_another_folder(tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    with pytest.raises(FolderFault, match="another server"):
        opened(tmp_path)
    folder.close()
    opened(tmp_path)


def test_a_folder_that_is_deleted_while_it_is_used_is_a_fault_and_can_be_opened_again(tmp_path: Path) -> None:
    import shutil

    folder, _ = opened(tmp_path / "cache")
    folder.put(record(1), packed(1))
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises((DamagedBlock, OSError)):
        folder.read(record(1))
    with pytest.raises(FolderFault, match="deleted"):
        folder.put(record(2), packed(2))
    folder.close()
    assert folder.open("m") == [] and folder.num_blocks == 0


def test_a_folder_that_cannot_be_made_is_a_fault_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderFault, match="file"):
        opened(tmp_path / "file" / "cache")


def test_a_full_disk_is_a_fault_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = opened(tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(FolderFault, match="No space left"):
        folder.put(record(1), packed(1))
    assert not list(tmp_path.glob("blocks/*/*"))


def test_clear_drops_one_model_or_all(tmp_path: Path) -> None:
    folder, _ = opened(tmp_path)
    folder.put(record(1), packed(1))
    folder.put(record(2, model="n"), packed(2))
    assert [u.model for u in folder.usage()] == ["n", "m"] or len(folder.usage()) == 2
    assert folder.clear("n") > 0 and folder.num_blocks == 1
    assert folder.clear() > 0 and folder.num_blocks == 0 and folder.nbytes == 0


def _write_for_ever(path: str) -> None:
    folder, _ = opened(Path(path))
    for seed in range(1_000_000):
        folder.put(record(seed), packed(seed % 7, size=200_000))


def test_kill_minus_nine_while_writing_leaves_only_whole_blocks(tmp_path: Path) -> None:
    """A few times here; `tools/kill_writer.py` does it fifty times against a whole server."""
    context = multiprocessing.get_context("spawn")
    num_before = 0
    for round_ in range(3):
        writer = context.Process(target=_write_for_ever, args=(str(tmp_path),))
        writer.start()
        assert writer.pid is not None
        until = time.monotonic() + 60
        while len(list(tmp_path.glob("blocks/*/*.safetensors"))) < num_before + 5 and time.monotonic() < until:
            time.sleep(0.002 + 0.001 * round_)
        num_written = len(list(tmp_path.glob("blocks/*/*.safetensors")))
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
        folder, found = opened(tmp_path)
        assert len(found) >= num_written > num_before, "what was written is there"
        assert list(folder.damaged()) == []
        num_before = len(found)
        folder.close()
