"""A real server with LoRA adapters: from the start and live, by model name and by field, on several routes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.engine.test_oracle_adapters import KINDS, write_adapter
from tests.serving.process import ServerProcess, serving


@pytest.fixture(scope="module")
def folders(tiny_model, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    base = tiny_model("qwen3")
    return {key: write_adapter(root / key, base, seed=i, **kind) for i, (key, kind) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def server(tiny_model, folders, tmp_path_factory) -> Iterator[ServerProcess]:
    flags = ["--served-model-name", "tiny", "--adapter", f"first={folders['first']}"]
    with serving(tiny_model("qwen3"), *flags, log=tmp_path_factory.mktemp("log") / "log") as running:
        yield running


def post(server: ServerProcess, path: str, **body) -> httpx.Response:
    return httpx.post(f"{server.url}{path}", json=body, timeout=60)


def text(server: ServerProcess, model: str, **fields) -> str:
    body = {"prompt": "The quick brown fox", "max_tokens": 12, "temperature": 0, **fields}
    response = post(server, "/v1/completions", model=model, **body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def test_an_adapter_is_chosen_by_the_models_name_or_by_a_field(server) -> None:
    plain, adapted = text(server, "tiny"), text(server, "tiny:first")
    assert plain != adapted == text(server, "default:first") == text(server, "tiny", adapter="first")
    assert text(server, "any-name") == plain == text(server, "llama3:8b")


def test_an_adapter_comes_and_goes_while_the_server_runs(server, folders) -> None:
    loaded = post(server, "/v1/load_lora_adapter", lora_name="second", lora_path=str(folders["second"]))
    assert loaded.status_code == 200 and loaded.json()["rank"] == KINDS["second"]["rank"]
    listed = {item["id"]: item for item in httpx.get(f"{server.url}/v1/models").json()["data"]}
    assert listed["tiny:second"]["parent"] == "tiny" and "tiny:first" in listed
    assert text(server, "tiny:second") not in (text(server, "tiny"), text(server, "tiny:first"))
    assert post(server, "/v1/unload_lora_adapter", lora_name="second").status_code == 200
    gone = post(server, "/v1/completions", model="tiny:second", prompt="x")
    assert gone.status_code == 404 and "'first'" in gone.json()["error"]["message"]


def test_many_rows_with_different_adapters_at_once_are_answered_as_alone(server, folders) -> None:
    post(server, "/v1/load_lora_adapter", lora_name="third", lora_path=str(folders["third"]))
    names = ["tiny", "tiny:first", "tiny:third"]
    alone = {name: text(server, name, cache_salt="alone") for name in names}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda name: text(server, name), names * 8))
    assert answers == [alone[name] for name in names * 8]


def test_every_protocol_takes_an_adapter(server) -> None:
    turn = {"role": "user", "content": "Hi"}
    for path, body in (
        ("/v1/chat/completions", {"messages": [turn]}),
        ("/v1/messages", {"messages": [turn], "max_tokens": 4}),
        ("/v1/responses", {"input": "Hi"}),
    ):
        for fields in ({"model": "tiny:first"}, {"model": "tiny", "adapter": "first"}):
            answer = post(server, path, **body, **fields)
            assert answer.status_code == 200 and answer.json()["model"] == "tiny:first", answer.text
        assert post(server, path, **body, model="tiny:nope").status_code == 404


def test_what_cannot_be_loaded_is_a_400_that_names_the_field(server, tmp_path) -> None:
    for fields, param in (
        ({"lora_name": "x", "lora_path": str(tmp_path / "nowhere")}, "lora_path"),
        ({"lora_name": "x", "lora_path": "relative"}, "lora_path"),
        ({"lora_name": "a:b", "lora_path": str(tmp_path)}, "lora_name"),
        ({"lora_path": str(tmp_path)}, "lora_name"),
    ):
        response = post(server, "/v1/load_lora_adapter", **fields)
        assert response.status_code == 400 and response.json()["error"]["param"] == param, response.text
    assert post(server, "/v1/unload_lora_adapter", lora_name="nope").status_code == 404


def test_an_adapter_of_another_base_ends_the_start_in_one_sentence(tiny_model, folders, tmp_path) -> None:
    with serving(
        tiny_model("mamba2"), "--adapter", f"a={folders['third']}", log=tmp_path / "log", is_awaited=False
    ) as server:
        code, output = server.wait(), server.output
        assert code == 1 and "it is another model's" in output and "Traceback" not in output
