"""`vllm-mlx tune` from end to end: with a machine that is a formula, and once with a real tiny model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.tiny_models import build
from tests.tune.fakes import FakeMachine
from vllm_mlx import cli
from vllm_mlx.backend import ModelFiles
from vllm_mlx.models.profile import ModelProfile
from vllm_mlx.settings import Settings
from vllm_mlx.tune import main as command
from vllm_mlx.tune import profile as tuned

MODEL = ModelProfile("demo", Path("/nowhere"), "qwen3", fingerprint="abc")


def tune(folder: Path, machine: FakeMachine) -> int:
    return command.run(Settings(), "2", folder=folder, open_model=lambda settings: (MODEL, machine, True))


def test_before_and_after_are_printed_and_the_better_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    machine = FakeMachine(prefill=lambda chunk: 512 / chunk, rate=lambda rows: min(rows, 16) * 10.0)
    assert tune(tmp_path, machine) == 0
    shown = capsys.readouterr().out
    assert "--prefill-step-size" in shown and "512" in shown and "2048" in shown and "4.00" in shown
    [path] = tmp_path.iterdir()
    found = tuned.read(path)
    assert found is not None and found.values == {"batch.prefill_step_size": 2048, "batch.max_num_seqs": 16}
    assert found.measured["a long prompt's first token"]["ratios"] == [4.0, 4.0]
    assert tuned.apply(Settings(), MODEL, tmp_path).batch.max_num_seqs == 16


@pytest.mark.parametrize("moment", (1, 20, 40))
def test_interrupted_it_leaves_what_was_there(tmp_path: Path, moment: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert tune(tmp_path, FakeMachine(stops_after=moment)) == 130
    assert not list(tmp_path.iterdir()) and "nothing was written" in capsys.readouterr().err
    assert tune(tmp_path, FakeMachine(prefill=lambda chunk: 512 / chunk)) == 0
    [path] = tmp_path.iterdir()
    before = path.read_bytes()
    assert tune(tmp_path, FakeMachine(stops_after=moment)) == 130
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_rounds_must_be_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tune", "demo", "--rounds", "many"]) == 2
    assert "--rounds" in capsys.readouterr().err
    assert cli.main(["tune", "demo", "--roundz", "3"]) == 2
    assert "did you mean --rounds?" in capsys.readouterr().err


def test_a_real_model_is_measured_and_served_with_what_was_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model, short work: every measurement runs on real engines, and the next start finds the profile."""
    from vllm_mlx.tune import measurer, search

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(search, "CHUNKS", (64,))
    monkeypatch.setattr(search, "ROWS", (1, 2))
    monkeypatch.setattr(search, "GUESSING_ROWS", (1,))
    monkeypatch.setattr(measurer, "LONG_ENOUGH_S", 0.0)
    monkeypatch.setenv("VLLM_MLX_MAX_NUM_SEQS", "2")
    model = build("qwen3", tmp_path / "model")
    assert cli.main(["tune", str(model), "--rounds", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Before and after" in shown and "2 rows" in shown
    [path] = (tmp_path / "cache" / "vllm-mlx" / "tuned").iterdir()
    assert str(path) in shown
    settings = Settings().with_values(model__model=str(model))
    files = ModelFiles.fetch(settings)
    assert any(f"({path})" in note for note in files.notes)
    shutil.rmtree(tmp_path / "cache")
    assert not any("Tuned profile" in note for note in ModelFiles.fetch(settings).notes)
