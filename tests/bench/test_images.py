"""The image model loads and answers; the image benchmark counts encoder runs and recomputed tokens rightly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.serving.process import serving
from vllm_mlx.bench import images
from vllm_mlx.bench.client import Endpoint
from vllm_mlx.bench.image_model import build_image_model
from vllm_mlx.bench.images import ImageBench, picture
from vllm_mlx.bench.report import Report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_image_model(tmp_path_factory.mktemp("bench"), "5m")


def test_it_is_built_once(folder: Path) -> None:
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert build_image_model(folder.parent, "5m") == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before


def test_pictures_differ_by_seed() -> None:
    assert picture(1) == picture(1) != picture(2)


async def test_a_long_conversation_encodes_each_picture_once_and_computes_no_block_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "NUM_TURNS", 12)
    report = Report()
    with serving(folder, log=tmp_path / "log") as server:
        bench = ImageBench("ours", Endpoint(f"{server.url}/v1"), report, max_tokens=4, seed=1)
        num_encoded, recomputed = await bench._long_conversation()
    assert not report.runs[0].summary.num_failed
    assert num_encoded == 4 and len(recomputed) == 11 and max(recomputed) <= 64
