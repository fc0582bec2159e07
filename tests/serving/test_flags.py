"""Claims about flags that are seen over HTTP: a server started with them behaves otherwise, and says so."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from tests.api.fakes import sse_payloads
from tests.serving.process import ServerProcess, serving

KEY = {"authorization": "Bearer sk-test"}
HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[ServerProcess]:
    flags = [
        "--api-key", "sk-test",
        "--strict-model-id", "--served-model-name", "tiny", "--model-alias", "small=default",
        "--effective-context-tokens", "1024",
        "--max-request-tokens", "900",
        "--timeout", "1",
        "--deterministic",
        "--max-body-mb", "1",
        "--cors-origin", "https://chat.example",
        "--repetition-policy", "off",
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("flags") / "log"
    with serving(tiny_model("qwen3"), *flags, log=log) as running:
        yield running


def chat(server: ServerProcess, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    body = {"model": "tiny", "messages": HI, "max_tokens": 16, "ignore_eos": True, **fields}
    return httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers=KEY if headers is None else headers, timeout=60
    )


def capabilities(server: ServerProcess) -> dict:
    return httpx.get(f"{server.url}/v1/capabilities", headers=KEY).json()


def test_only_the_key_opens_it(server):
    assert chat(server, headers={}).status_code == 401
    assert chat(server, headers={"x-api-key": "sk-tes"}).status_code == 401
    assert chat(server).status_code == 200 and chat(server, headers={"x-api-key": "sk-test"}).status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/health/diagnostics").status_code == 401
    assert capabilities(server)["auth"]["api_key_required"] is True
    assert "sk-test" not in server.output


def test_only_the_models_names_are_served(server):
    assert chat(server, model="small").status_code == 200
    for name in ("default", "gpt-4o"):
        response = chat(server, model=name)
        assert response.status_code == 404 and "tiny" in response.json()["error"]["message"]
    assert capabilities(server)["features"]["strict_model_id"] is True


def test_the_effective_context_is_enforced_and_reported(server):
    error = chat(server, messages=[{"role": "user", "content": "word " * 1500}]).json()["error"]
    assert error["code"] == "context_length_exceeded" and "1024" in error["message"]
    limits = capabilities(server)["limits"]
    assert limits["effective_context_tokens"] == 1024 and limits["max_context_tokens"] == 4096
    assert limits["effective_context_source"] == "operator_override"


def test_more_tokens_than_a_request_may_have_are_refused(server):
    error = chat(server, max_tokens=901)
    assert error.status_code == 400 and error.json()["error"]["param"] == "max_tokens"


def test_a_requests_own_time_limit_cannot_pass_the_servers(server):
    endless = {"n": 64, "max_tokens": 900, "timeout": 1000}
    response = chat(server, **endless)
    assert response.status_code == 504 and "1 seconds" in response.json()["error"]["message"]
    assert sse_payloads(chat(server, stream=True, **endless).text)[-1]["error"]["code"] == "timeout"
    assert capabilities(server)["limits"]["default_timeout_seconds"] == 1


def test_deterministic_is_greedy_whatever_the_request_says(server):
    texts = {
        chat(server, temperature=t, top_p=0.5, seed=s).json()["choices"][0]["message"]["content"]
        for t, s in ((1.9, 1), (1.9, 2), (0, 3))
    }
    assert len(texts) == 1
    assert capabilities(server)["features"]["deterministic"] is True
    shown = chat(server, temperature=1.9, include_diagnostics=True).json()["diagnostics"]["sampling"]
    assert shown["temperature"] == {"value": 0.0, "source": "deterministic"}


def test_a_body_above_the_limit_is_413(server):
    response = chat(server, messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert response.status_code == 413 and "1 MiB" in response.json()["error"]["message"]
    assert capabilities(server)["limits"]["max_body_bytes"] == 2**20


def test_the_allowed_origin_may_call_from_a_browser(server):
    allowed = httpx.get(f"{server.url}/health", headers={"origin": "https://chat.example"})
    assert allowed.headers["access-control-allow-origin"] == "https://chat.example"
