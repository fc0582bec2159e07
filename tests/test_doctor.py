"""What `vllm-mlx doctor` says, and that it notices what does not work."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mlx import __version__, doctor
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.settings import CpuSettings


@pytest.fixture
def installed_from(monkeypatch):
    """Pretend that the package was installed with this direct_url.json."""

    def pretend(origin: dict[str, object] | None) -> None:
        text = json.dumps(origin) if origin is not None else None
        distribution = type("Distribution", (), {"read_text": lambda self, name: text})()
        monkeypatch.setattr(importlib.metadata, "distribution", lambda name: distribution)

    return pretend


def test_it_names_program_libraries_machine_and_result(capsys):
    assert doctor.run(CpuSettings()) in (0, 1)
    text = capsys.readouterr().out
    for words in (__version__, sys.executable, "mlx-lm", "BLAS", "memory", "cache", "ok         matrix products",
                  "ok         model libraries"):
        assert words in text


def test_a_check_that_fails_is_told_and_makes_the_exit_code_1(capsys, monkeypatch):
    def broken() -> str:
        raise ModelLoadError("The model is gone.")

    monkeypatch.setattr(doctor, "CHECKS", (("good", lambda: "fine"), ("bad", broken), ("last", lambda: "also run")))
    assert doctor.run(CpuSettings()) == 1
    text = capsys.readouterr().out
    assert "FAILED     bad: ModelLoadError: The model is gone." in text
    assert "ok         last: also run" in text


def test_an_editable_checkout_is_named_with_branch_commit_and_changes(installed_from, monkeypatch, tmp_path):
    def git(*words: str) -> None:
        subprocess.run(["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True,
                       capture_output=True)

    (tmp_path / "vllm_mlx").mkdir()
    (tmp_path / "vllm_mlx" / "__init__.py").write_text("")
    git("init", "-b", "trial")
    git("add", ".")
    git("commit", "-m", "first")
    installed_from({"url": tmp_path.as_uri(), "dir_info": {"editable": True}})
    elsewhere = doctor.install_kind()
    assert elsewhere.startswith("run in place from") and elsewhere.endswith(f"checkout {tmp_path} is not used")
    monkeypatch.setattr(doctor, "__file__", str(tmp_path / "vllm_mlx" / "doctor.py"))
    assert doctor.install_kind().startswith(f"editable checkout {tmp_path}, branch trial at ")
    assert doctor.install_kind().endswith("no local changes")
    (tmp_path / "new").write_text("")
    assert doctor.install_kind().endswith("1 file differs")


def test_a_published_install_is_named_with_its_commit_and_without_secrets(installed_from, monkeypatch, tmp_path):
    commit = {"vcs": "git", "commit_id": "a" * 40}
    installed_from({"url": "https://me:token@example.org/vllm-mlx.git", "vcs_info": commit})
    assert doctor.install_kind() == f"installed package, from https://example.org/vllm-mlx.git at {'a' * 12}"
    (tmp_path / "uv-receipt.toml").write_text("")
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert doctor.install_kind().startswith("uv tool, from ")


def test_run_in_place_is_said(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    assert doctor.install_kind().startswith(f"not installed; run in place from {Path(__file__).parents[1]}")
