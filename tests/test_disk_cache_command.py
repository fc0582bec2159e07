"""`vllm-mlx cache`: lists, checks and empties a folder, and says in a sentence what it cannot do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from vllm_mlx.cli import main
from vllm_mlx.engine import disk_blocks
from vllm_mlx.engine.disk_blocks import Packed, Record
from vllm_mlx.engine.disk_folder import BlockFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = BlockFolder(tmp_path, limit_bytes=1 << 30)
    folder.open("qwen abc")
    for model in ("qwen abc", "llama def"):
        folder.put(Record(model, "kv", 0, 16, b"a" * 16, b"b" * 16), Packed((np.arange(1000),), "0"))
    folder.close()
    return tmp_path


def test_ls_shows_each_model_with_its_bytes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "qwen abc" in shown and "llama def" in shown and "2 blocks in all" in shown


def test_clear_takes_one_model_or_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "clear", str(folder), "--model", "llama"]) == 0
    main(["cache", "ls", str(folder)])
    assert "1 blocks in all" in capsys.readouterr().out
    assert main(["cache", "clear", str(folder)]) == 0
    assert not list(folder.glob("blocks/*/*"))


def test_verify_removes_what_is_damaged_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "verify", str(folder)]) == 0
    name = Record("qwen abc", "kv", 0, 16, b"a" * 16, b"b" * 16).name
    file = disk_blocks.path_of(folder, name)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    assert main(["cache", "verify", str(folder)]) == 1
    assert name in capsys.readouterr().out and not file.exists()
    assert main(["cache", "verify", str(folder)]) == 0


def test_a_folder_in_use_or_missing_is_one_sentence(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls", str(folder / "nowhere")]) == 1
    server = BlockFolder(folder, limit_bytes=1 << 30)
    server.open("m")
    assert main(["cache", "clear", str(folder)]) == 1
    assert "another server" in capsys.readouterr().err
    server.close()
