"""`serve` and `download` of a model that a stand-in of the hub has: time-out, retries, revision, and no network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.models.test_download import COMMIT, MODEL, Hub, hub  # noqa: F401  (a fixture)
from tests.serving.process import serving


@pytest.fixture
def environment(hub: Hub, tiny_model, tmp_path: Path) -> dict[str, str]:  # noqa: F811
    hub.files = {file.name: file.read_bytes() for file in tiny_model("qwen3").iterdir()}
    hub.cut_after = 1000
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_CACHE": str(tmp_path / "home" / "hub")}


def download(environment: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vllm_mlx.cli", "download", MODEL, *flags]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def test_a_model_that_is_cut_off_once_is_fetched_at_its_revision_and_served(hub, environment, tmp_path):  # noqa: F811
    hub.num_cuts = 1
    flags = ["--download-retries", "1", "--revision", COMMIT]
    with serving(MODEL, *flags, log=tmp_path / "log", environment=environment) as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == MODEL
        body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "ignore_eos": True}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["usage"]["completion_tokens"] == 4
    assert hub.fetched.count("model.safetensors") == 2

    # What came is kept: from now on nobody need be asked.
    hub.status = 503
    assert download(environment, "--offline", "--revision", COMMIT).returncode == 0


def test_a_silent_hub_is_given_up_after_the_time_that_was_set(hub, environment):  # noqa: F811
    hub.stall_s, hub.num_stalls = 2.0, 1
    result = download(environment, "--download-timeout", "0.3")
    assert result.returncode == 0 and "timed out" in result.stderr, result.stderr
    assert hub.fetched.count("model.safetensors") == 2


@pytest.mark.parametrize("retries", [0, 1])
def test_a_hub_that_does_not_answer_is_asked_again_as_often_as_was_set(hub, environment, retries):  # noqa: F811
    hub.status = 503
    result = download(environment, "--download-retries", str(retries))
    assert result.returncode == 1 and "503" in result.stderr.splitlines()[-1]
    assert "".join(result.stderr.split()).count("answered503") == 1 + retries, result.stderr
