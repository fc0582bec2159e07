"""A model whose prompts are read whole, behind a real server: what is ours around it is as it is for any model."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.process import ServerProcess, serving
from tests.tiny_vlms import picture


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., Path]) -> Iterator[ServerProcess]:
    with serving(tiny_model("mllama"), log=tmp_path_factory.mktemp("whole") / "log") as process:
        yield process


def body(seed: int | None, **fields: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": "What is it?"}]
    if seed is not None:
        data = io.BytesIO()
        picture(seed).save(data, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    messages = [{"role": "user", "content": parts}]
    return {"model": "default", "messages": messages, "max_tokens": 10, "temperature": 0.0, **fields}


def ask(server: ServerProcess, seed: int | None, **fields: Any) -> dict[str, Any]:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body(seed, **fields), timeout=120)
    assert answer.status_code == 200, answer.text
    choice: dict[str, Any] = answer.json()["choices"][0]
    return choice


def test_capabilities_say_how_it_is_served(server: ServerProcess) -> None:
    told = httpx.get(f"{server.url}/v1/capabilities").json()
    assert told["modalities"]["image"] and not told["features"]["continuous_batching"]
    assert not told["features"]["prefix_cache"]
    assert any("cross-attention" in note for note in told["notes"])


def test_streams_stops_and_shapes_are_this_servers(server: ServerProcess) -> None:
    whole = ask(server, 1)["message"]["content"]
    assert whole and whole != ask(server, 2)["message"]["content"]
    text = ""
    stream = body(1, stream=True)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=stream, timeout=120) as lines:
        for line in lines.iter_lines():
            if line.startswith("data: {"):
                delta = json.loads(line[6:])["choices"][0]["delta"]
                text += delta.get("content") or ""
    assert text == whole
    stopped = ask(server, 1, stop=[whole[3:6]])
    assert stopped["message"]["content"] == whole[: whole.index(whole[3:6])] and stopped["finish_reason"] == "stop"
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    shaped = ask(server, 1, response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
                 max_tokens=40)  # fmt: skip
    assert json.loads(shaped["message"]["content"])["n"] in (1, 2)


def test_requests_beside_each_other_are_answered_as_alone(server: ServerProcess) -> None:
    seeds = [1, 2, None, 3, 1]
    alone = [ask(server, seed)["message"]["content"] for seed in seeds]
    with ThreadPoolExecutor(len(seeds)) as pool:
        together = list(pool.map(lambda seed: ask(server, seed)["message"]["content"], seeds))
    assert together == alone


def test_log_probabilities_of_a_prompt_that_it_never_has_are_refused(server: ServerProcess) -> None:
    answer = httpx.post(
        f"{server.url}/v1/completions",
        json={"model": "default", "prompt": "Hello", "echo": True, "logprobs": 1, "max_tokens": 2},
        timeout=120,
    )
    assert answer.status_code == 400, answer.text
    assert ask(server, 1)["message"]["content"]
