"""The benchmark's model: loads, never ends early, and says one readable piece a token; over the offline runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.bench.model import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("bench"), "5m")


def test_it_is_built_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build(folder.parent, "5m") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_answers_have_their_full_length_and_only_whole_characters(folder: Path) -> None:
    from dataclasses import asdict

    from vllm_mlx.bench.offline import OfflineRunner
    from vllm_mlx.bench.workloads import make

    runner = OfflineRunner(str(folder))
    conversations = make("short", 3, seed=1, max_tokens=24) + make(
        "multi-turn", 1, seed=1, max_tokens=4, prompt_tokens=400
    )
    pieces: list[str] = []
    decode = runner._tokenizer.decode
    runner._tokenizer.decode = lambda ids: pieces.extend(decode([i]) for i in ids) or decode(ids)
    traces = runner.run([asdict(c) for c in conversations], 4)
    assert sorted(t["num_completion_tokens"] for t in traces) == [4] * 4 + [24] * 3
    assert all(t["error"] is None and len(t["stamps"]) == t["num_completion_tokens"] for t in traces)
    assert pieces and all(piece and "\ufffd" not in piece for piece in pieces)
    later = [t for t in traces if t["turn"] > 0]
    assert len(later) == 3 and all(t["num_cached_tokens"] > 0 for t in later)
