"""CUDA sources compiled at run time: what is kept, and what happens where nothing can be compiled."""

from __future__ import annotations

import pytest

from vllm_mlx.models import nvrtc


@pytest.fixture
def compiler(monkeypatch, tmp_path) -> list[list[str]]:
    """The options of each compilation, by a compiler that gives the number of calls."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_capability", lambda: 90)
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 0))
    calls: list[list[str]] = []

    def compile_(source: str, options: list[str]) -> bytes:
        calls.append(options)
        return str(len(calls)).encode()

    monkeypatch.setattr(nvrtc, "_compile", compile_)
    return calls


def test_what_was_compiled_is_kept(compiler) -> None:
    assert nvrtc.compiled("code", {"D": 64}) == nvrtc.compiled("code", {"D": 64}) == b"1"
    assert compiler == [["--gpu-architecture=sm_90", "--std=c++17", "-DD=64"]]


def test_another_source_size_device_or_compiler_is_compiled_anew(compiler, monkeypatch) -> None:
    found = [nvrtc.compiled("code", {"D": 64}), nvrtc.compiled("code", {"D": 128}), nvrtc.compiled("other", {"D": 64})]
    monkeypatch.setattr(nvrtc, "_capability", lambda: 80)
    found.append(nvrtc.compiled("code", {"D": 64}))
    monkeypatch.setattr(nvrtc, "_version", lambda: (13, 1))
    found.append(nvrtc.compiled("code", {"D": 64}))
    assert found == [b"1", b"2", b"3", b"4", b"5"]


def test_a_folder_that_cannot_be_written_is_done_without(compiler, monkeypatch, tmp_path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.compiled("code", {}) == b"1" and nvrtc.compiled("code", {}) == b"2"


def test_without_a_compiler_it_says_so(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "_capability", lambda: 90)
    if "libnvrtc" in open("/proc/self/maps").read():
        pytest.skip("there is one")
    with pytest.raises(nvrtc.CompileError, match="NVRTC"):
        nvrtc.compiled("code", {})
