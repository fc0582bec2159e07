"""A real server whose pool has chat, embedding, rerank and audio models: loaded on demand, giving way, given back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests import tiny_encoders
from tests.engine.test_oracle_adapters import KINDS, write_adapter
from tests.generation.test_audio_files import wav
from tests.serving.process import ServerProcess, serving
from tests.tiny_whisper import build_whisper

# Room for both chat models (some 80 MiB each) and one model beside them (32 MiB), or for one and all of those.
BUDGET_GB = "0.2"


@pytest.fixture(scope="module")
def embedder(tmp_path_factory) -> Path:
    return tiny_encoders.build_embedder("bert", tmp_path_factory.mktemp("models") / "embedder")


@pytest.fixture(scope="module")
def server(tiny_model, embedder, tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("pool")
    ranker = tiny_encoders.build_cross_encoder("bert", folder / "ranker")
    models = [
        {"id": "vectors", "path": str(embedder), "kind": "embedding", "aliases": ["text-embedding-3-small"],
         "settings": {"embedding-max-length": 16, "embedding-overflow-policy": "error"}},
        {"id": "chat", "path": str(tiny_model("qwen3")), "pinned": True},
        {"id": "other", "path": str(tiny_model("qwen3"))},
        {"id": "ears", "path": str(build_whisper(folder / "whisper")), "kind": "transcription"},
    ]  # fmt: skip
    config = folder / "models.yaml"
    config.write_text(json.dumps({"models": models}))
    # A flag names a member, too.
    flags = ["--models-config", str(config), "--memory-budget-gb", BUDGET_GB, "--rerank-model", str(ranker)]
    with serving("", *flags, log=folder / "log") as running:
        yield running
        running.signal()
        assert running.wait() == 0 and "Traceback" not in running.output, running.output


def post(server: ServerProcess, path: str, **body: object) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def embed(server: ServerProcess, text: str = "the quick brown fox", model: str = "vectors") -> httpx.Response:
    return post(server, "/v1/embeddings", input=text, model=model)


def hear(server: ServerProcess) -> httpx.Response:
    files, form = {"file": ("clip.wav", wav(1.0))}, {"model": "ears", "language": "en"}
    return httpx.post(f"{server.url}/v1/audio/transcriptions", files=files, data=form, timeout=120)


def listed(server: ServerProcess) -> dict[str, dict]:
    return {item["id"]: item for item in httpx.get(f"{server.url}/v1/models").json()["data"]}


def say(server: ServerProcess, model: str) -> str:
    body = {"prompt": "The quick brown fox", "max_tokens": 6, "temperature": 0, "model": model}
    response = post(server, "/v1/completions", **body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def test_they_are_listed_by_task_and_loaded_by_the_request_that_needs_them(server, embedder) -> None:
    from vllm_mlx.models.encoder import load_embedder
    from vllm_mlx.models.token_row import TokenRow

    before = listed(server)
    assert before["vectors"]["task"] == before["text-embedding-3-small"]["task"] == "embedding"
    assert before["vectors"]["state"] == before["ears"]["state"] == "unloaded"
    assert "task" not in before["chat"] and before["chat"]["state"] == "ready", "the first chat model is the default"
    answer = embed(server).json()
    model = load_embedder(embedder)
    expected = model.compute([TokenRow(tuple(model.tokenizer.encode("the quick brown fox")))])[0]
    assert answer["model"] == "vectors" and np.abs(np.array(answer["data"][0]["embedding"]) - expected).max() < 1e-5
    after = listed(server)["vectors"]
    assert after["state"] == "ready" and after["memory_bytes"] > 32 << 20 and after["num_active"] == 0
    assert embed(server, model="text-embedding-3-small").json()["model"] == "vectors"


def test_settings_of_their_own_hold(server) -> None:
    refused = embed(server, "a lazy dog and a box " * 20)
    assert refused.status_code == 400 and "input" in refused.json()["error"]["param"]


def test_they_and_chat_models_make_one_another_give_way(server) -> None:
    embed(server)
    say(server, "other")  # the embedder is in memory beside it
    assert listed(server)["other"]["state"] == "ready"
    ranked = post(server, "/v1/rerank", query="fox", documents=["a lazy dog", "the quick brown fox"])
    assert ranked.status_code == 200
    assert hear(server).status_code == 200
    states = {name: item["state"] for name, item in listed(server).items()}
    assert states["other"] == "unloaded" and states["ears"] == states["chat"] == "ready"
    say(server, "other")
    gone = [name for name, item in listed(server).items() if item.get("task") and item["state"] == "unloaded"]
    assert gone, "the models beside the chat that were used least recently gave way"


def test_many_requests_of_all_kinds_at_once_are_all_answered(server) -> None:
    jobs = [lambda: embed(server), lambda: say(server, "other"), lambda: say(server, "chat")] * 4
    jobs.insert(5, lambda: hear(server))
    with ThreadPoolExecutor(8) as pool:
        answers = [future.result() for future in [pool.submit(job) for job in jobs]]
    assert all(isinstance(a, str) or a.status_code == 200 for a in answers)


def test_they_are_loaded_and_unloaded_on_request(server) -> None:
    for action, state in (("load", "ready"), ("unload", "unloaded"), ("unload", "unloaded")):
        answer = post(server, f"/v1/models/vectors/{action}").json()
        assert (answer["id"], answer["task"], answer["state"]) == ("vectors", "embedding", state)
    assert embed(server).status_code == 200


def test_a_model_for_another_task_is_refused_by_name(server) -> None:
    response = post(server, "/v1/chat/completions", model="ears", messages=[{"role": "user", "content": "Hi"}])
    assert response.status_code == 400 and "is served for transcription" in response.json()["error"]["message"]
    assert "is served for transcription" in embed(server, model="ears").json()["error"]["message"]


def test_an_adapter_that_was_loaded_live_comes_back_with_its_model(server, tiny_model, tmp_path) -> None:
    folder = write_adapter(tmp_path / "extra", tiny_model("qwen3"), seed=1, **KINDS["first"])
    say(server, "other")
    loaded = post(server, "/v1/load_lora_adapter", lora_name="extra", lora_path=str(folder), model="other")
    assert loaded.status_code == 200, loaded.text
    adapted = say(server, "other:extra")
    assert adapted != say(server, "other")
    assert post(server, "/v1/models/other/unload").json()["state"] == "unloaded"
    assert "other:extra" in listed(server)
    assert say(server, "other:extra") == adapted
