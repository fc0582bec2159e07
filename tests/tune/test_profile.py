"""A profile is found by what it was measured on, yields to flags, and is written whole or not at all."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from vllm_mlx import machine
from vllm_mlx.models.profile import ModelProfile
from vllm_mlx.settings import Settings
from vllm_mlx.tune.profile import TunedProfile, apply, key_of, path_of, read, write

MODEL = ModelProfile("demo", Path("/nowhere"), "qwen3", fingerprint="abc")
VALUES = {"batch.prefill_step_size": 1024, "batch.max_num_seqs": 32, "speculation.speculation": "off"}
FOUND = TunedProfile("demo", VALUES, created=1_790_000_000.0)


def kept(folder: Path, settings: Settings | None = None) -> Settings:
    settings = settings or Settings()
    write(FOUND, path_of(settings, MODEL, folder))
    return apply(settings, MODEL, folder)


def test_a_start_uses_what_was_found_and_says_so(tmp_path: Path) -> None:
    settings = kept(tmp_path)
    assert (settings.batch.prefill_step_size, settings.batch.max_num_seqs) == (1024, 32)
    assert settings.speculation.speculation == "off"
    [note] = settings.notes
    assert "--prefill-step-size 1024" in note and "--no-tune-profile" in note and str(tmp_path) in note
    assert settings.resolve(MODEL)[1][0] == note


def test_flags_win(tmp_path: Path) -> None:
    given = Settings(given=frozenset({"batch.max_num_seqs"})).with_values(batch__max_num_seqs=7)
    settings = kept(tmp_path, given)
    assert settings.batch.max_num_seqs == 7 and settings.batch.prefill_step_size == 1024
    assert "--max-num-seqs" not in settings.notes[0]


@pytest.mark.parametrize("values", [{"model__tune_profile": False}, {"sampling__deterministic": True},
                                    {"model__distributed": "tensor"}])  # fmt: skip
def test_who_does_not_want_it_or_computes_otherwise_does_not_get_it(tmp_path: Path, values: dict[str, object]) -> None:
    settings = Settings().with_values(**values)
    assert kept(tmp_path, settings) == settings


def test_a_draft_model_and_one_row_keep_their_own(tmp_path: Path) -> None:
    settings = kept(tmp_path, Settings().with_values(speculation__draft_model="d", batch__runtime_mode="simple"))
    assert settings.speculation.speculation == "auto" and settings.batch.max_num_seqs == 256
    assert settings.batch.prefill_step_size == 1024


def test_another_machine_model_precision_or_version_has_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {key_of(Settings(), MODEL)}
    keys.add(key_of(Settings(), replace(MODEL, fingerprint="abd")))
    keys.add(key_of(Settings().with_values(model__dtype="bfloat16"), MODEL))
    keys.add(key_of(Settings().with_values(cache__kv_bits=8), MODEL))
    keys.add(key_of(Settings().with_values(cpu__blas_threads=2), MODEL))
    monkeypatch.setattr("vllm_mlx.tune.profile.__version__", "0.0.0")
    keys.add(key_of(Settings(), MODEL))
    monkeypatch.setattr(machine, "processor", lambda: "another")
    keys.add(key_of(Settings(), MODEL))
    assert len(keys) == 7
    assert key_of(Settings().with_values(batch__max_num_seqs=3), MODEL) in keys  # what was tuned is no part of it


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": "m", "values": 3, "created": 1}'])
def test_a_file_that_is_no_profile_is_as_good_as_none(tmp_path: Path, text: str) -> None:
    path = path_of(Settings(), MODEL, tmp_path)
    path.write_text(text)
    assert read(path) is None and apply(Settings(), MODEL, tmp_path) == Settings()


def test_values_that_make_no_sense_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    values = {"batch.max_num_seqs": 0, "batch.prefill_step_size": True, "speculation.speculation": "always",
              "server.host": "0.0.0.0"}  # fmt: skip
    path.write_text(json.dumps({"model": "m", "values": values, "created": 1}))
    found = read(path)
    assert found is not None and found.values == {}


def test_a_write_that_fails_leaves_the_old_profile_and_nothing_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.json"
    write(FOUND, path)

    def full(fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        write(replace(FOUND, values={}), path)
    assert read(path) == FOUND and list(tmp_path.iterdir()) == [path]
