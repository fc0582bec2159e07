"""The limit of open files: refused in a sentence where it is too low, and taken as far as mlx-lm leaves it."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest

from vllm_mlx.errors import VllmMlxError
from vllm_mlx.guards import open_files


@pytest.mark.parametrize("hard", [4096, 65536, resource.RLIM_INFINITY])
def test_enough_is_enough(monkeypatch: pytest.MonkeyPatch, hard: int) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, hard))
    open_files.check()


def test_too_few_are_one_sentence_unless_it_is_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1024, 1024))
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(VllmMlxError, match="may open 1024 files, and mlx-lm needs to be allowed 4096"):
        open_files.check()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    open_files.check()


def test_a_process_takes_all_that_it_is_left() -> None:
    code = (
        "import resource; from vllm_mlx.guards import open_files; kind = resource.RLIMIT_NOFILE;"
        "resource.setrlimit(kind, (100, 200)); open_files.widen(); print(*resource.getrlimit(kind))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["200", "200"]
