"""Each sampling default by itself: left out of a request that names all the others, it must be what made the answer.

The key is in the environment, where the process list does not show it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.serving.process import ServerProcess, serving

KEY = {"authorization": "Bearer sk-from-the-environment"}
NEUTRAL = {"temperature": 1.5, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "presence_penalty": 0.0,
           "frequency_penalty": 0.0, "repetition_penalty": 1.0}  # fmt: skip
DEFAULTS = {"temperature": 0.0, "top_p": 0.0001, "top_k": 1, "min_p": 1.0, "presence_penalty": 2.0,
            "frequency_penalty": 1.7, "repetition_penalty": 1.8}  # fmt: skip
SHARPEN = ("temperature", "top_p", "top_k", "min_p")
PENALTIES = ("presence_penalty", "frequency_penalty", "repetition_penalty")


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[ServerProcess]:
    flags = [text for name, value in DEFAULTS.items() for text in (f"--default-{name.replace('_', '-')}", str(value))]
    environment = {"VLLM_MLX_API_KEY": "sk-from-the-environment", "VLLM_MLX_REPETITION_POLICY": "off"}
    flags += ["--cache-memory-percent", "0.0000001", "--speculation", "off"]
    log = tmp_path_factory.mktemp("sampling") / "log"
    with serving(tiny_model("qwen3"), *flags, log=log, environment=environment) as running:
        yield running


def say(server: ServerProcess, route: str = "chat/completions", **sampling: Any) -> str:
    text = "Hi there"
    asked = {"prompt": text} if route == "completions" else {"messages": [{"role": "user", "content": text}]}
    body = {**asked, "max_tokens": 24, "ignore_eos": True, **sampling}
    answer = httpx.post(f"{server.url}/v1/{route}", json=body, headers=KEY, timeout=60).raise_for_status().json()
    return answer["choices"][0].get("text") or answer["choices"][0]["message"]["content"]


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("name", SHARPEN)
def test_a_default_that_leaves_one_token_leaves_one_answer(server, name, route):
    without = {key: value for key, value in NEUTRAL.items() if key != name}
    assert len({say(server, route, **without, seed=seed) for seed in range(3)}) == 1
    assert len({say(server, route, **NEUTRAL, seed=seed) for seed in range(3)}) == 3


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
@pytest.mark.parametrize("name", PENALTIES)
def test_a_default_penalty_is_the_one_that_a_request_could_have_named(server, name, route):
    plain = {**NEUTRAL, "temperature": 0.0}
    without = {key: value for key, value in plain.items() if key != name}
    by_flag = say(server, route, **without)
    assert by_flag == say(server, route, **{**plain, name: DEFAULTS[name]})
    assert by_flag != say(server, route, **plain)


def test_a_tiny_share_of_the_memory_leaves_the_prefix_cache_its_least(server):
    lines = httpx.get(f"{server.url}/metrics", headers=KEY).text.splitlines()
    (budget,) = [line for line in lines if line.startswith("vllm_mlx:prefix_cache_budget_bytes")]
    assert float(budget.split()[-1]) == 100 * 2**20


def test_without_speculation_nothing_is_guessed_of_an_answer_that_repeats_itself(server):
    loop = {**NEUTRAL, "temperature": 0.0, "logit_bias": {"77": 100}}
    say(server, **loop)
    assert "spec_decode" not in httpx.get(f"{server.url}/metrics", headers=KEY).text


def test_a_key_of_the_environment_is_asked_for_and_not_shown(server):
    url = f"{server.url}/v1/models"
    assert httpx.get(url).status_code == 401
    assert httpx.get(url, headers={"x-api-key": "sk-from-the-environmen"}).status_code == 401
    assert httpx.get(url, headers=KEY).status_code == 200
    shown = httpx.get(f"{server.url}/health/diagnostics", headers=KEY).json()["program"]
    assert "sk-from" not in str(shown) and "sk-from" not in server.output
