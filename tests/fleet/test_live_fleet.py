"""A real server with several models: loaded on demand, one giving way to another, names, states, memory."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.serving.process import ServerProcess, serving
from tests.tiny_encoders import build_embedder

# Each demo model costs some 25 MB of weights and at least 64 MiB for keys and values: two fit, three do not.
BUDGET_GB = "0.2"


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("fleet")
    config = folder / "models.yaml"
    models = [
        {"id": "one", "path": "demo", "aliases": ["claude-opus"], "pinned": True},
        {"id": "two", "path": "demo", "settings": {"max-num-seqs": 2}},
        {"id": "three", "path": "demo"},
    ]
    config.write_text(json.dumps({"models": models}))  # JSON is YAML
    flags = ["--models-config", str(config), "--memory-budget-gb", BUDGET_GB, "--model-alias", "haiku=two"]
    with serving("", *flags, log=folder / "log") as running:
        yield running


def ask(server: ServerProcess, model: str, **fields) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "Reply with pong"}], "max_tokens": 8, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def states(server: ServerProcess) -> dict[str, str]:
    return {item["id"]: item["state"] for item in httpx.get(f"{server.url}/v1/models").json()["data"]}


def test_models_are_loaded_when_named_and_the_least_recently_used_gives_way(server) -> None:
    assert states(server)["one"] == "ready"
    assert states(server)["two"] == states(server)["three"] == "unloaded"
    for name in ("two", "three", "two"):
        answer = ask(server, name).json()
        assert answer["model"] == name and "pong" in answer["choices"][0]["message"]["content"].lower()
    assert states(server) | {"one": "ready", "two": "ready", "three": "unloaded"} == states(server)


def test_names_are_ids_aliases_and_default_and_others_are_404_with_the_list(server) -> None:
    for name, served in (("default", "one"), ("claude-opus", "one"), ("haiku", "two")):
        assert ask(server, name).json()["model"] == served
    response = ask(server, "gpt-9")
    assert response.status_code == 404
    assert all(f"'{name}'" in response.json()["error"]["message"] for name in ("one", "two", "three"))


def test_many_requests_to_models_that_exclude_each_other_are_all_answered(server) -> None:
    names = ["two", "three", "one"] * 5
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: ask(server, name), names))
    assert [(a.status_code, a.json()["model"]) for a in answers] == [(200, name) for name in names]


def test_a_stream_to_a_model_that_must_be_loaded_first(server) -> None:
    httpx.post(f"{server.url}/v1/models/three/unload")
    body = {"model": "three", "messages": [{"role": "user", "content": "Reply with pong"}], "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        text = response.read().decode()
    assert response.status_code == 200 and text.endswith("data: [DONE]\n\n") and "pong" in text


def test_models_are_loaded_and_unloaded_on_request(server) -> None:
    loaded = httpx.post(f"{server.url}/v1/models/two/load", timeout=60).json()
    assert (loaded["id"], loaded["state"]) == ("two", "ready")
    unloaded = httpx.post(f"{server.url}/v1/models/two/unload", timeout=60).json()
    assert unloaded["state"] == "unloaded"
    assert httpx.post(f"{server.url}/v1/models/one/unload").status_code == 409
    assert httpx.post(f"{server.url}/v1/models/nine/load").status_code == 404


def test_memory_comes_back_and_counters_go_on(server) -> None:
    def resident_mib() -> float:
        status = Path(f"/proc/{server.process.pid}/status")
        if not status.exists():
            pytest.skip("resident memory is read from /proc")
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024

    readings = []
    for _ in range(4):
        for name in ("two", "three"):
            httpx.post(f"{server.url}/v1/models/{name}/load", timeout=60)
            ask(server, name)
            httpx.post(f"{server.url}/v1/models/{name}/unload", timeout=60)
        readings.append(resident_mib())
    assert readings[-1] - readings[0] < 20, readings  # six loads of 25 MB of weights
    tokens = httpx.get(f"{server.url}/v1/status").json()["total_completion_tokens"]
    ask(server, "two")
    assert httpx.get(f"{server.url}/v1/status").json()["total_completion_tokens"] > tokens


def test_diagnostics_and_memory_know_of_the_pool(server) -> None:
    body = httpx.get(f"{server.url}/health/diagnostics").json()
    assert set(body["checks"]["models"]["metadata"]) == {"one", "two", "three"}
    assert 0 < body["memory"]["pool_used_gb"] <= body["memory"]["pool_budget_gb"] == float(BUDGET_GB)


def test_idle_models_give_their_memory_back_and_return_when_asked(tmp_path) -> None:
    embedder = str(build_embedder("bert", tmp_path / "embedder"))
    flags = ("--idle-unload-seconds", "0.2", "--embedding-model", embedder)
    with serving("demo", *flags, log=tmp_path / "log") as server:
        limit = time.monotonic() + 60
        for _ in range(2):
            assert httpx.post(f"{server.url}/v1/embeddings", json={"input": "a fox"}, timeout=60).status_code == 200
            while (states(server)["demo"], states(server)[embedder]) != ("unloaded", "unloaded"):
                assert time.monotonic() < limit
                time.sleep(0.05)
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert "pong" in ask(server, "any-name").json()["choices"][0]["message"]["content"].lower()


def test_a_model_that_can_never_fit_ends_the_start_with_the_numbers(tmp_path) -> None:
    with serving("demo", "--memory-budget-gb", "0.01", "--idle-unload-seconds", "9", log=tmp_path / "log",
                 is_awaited=False) as server:  # fmt: skip
        assert server.wait() == 1
        assert "can never fit the budget of 0.01 GiB" in server.output
