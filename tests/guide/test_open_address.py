"""Flags of a server that listens for everybody, of what it keeps and writes down, and of how it cuts prompts.

Two servers, one after the other on the same response store; each has as many flags as do not hide one another's effect.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.process import ServerProcess, other_address, serving

OVERRIDE = {"repetition_policy_override": "off"}
STORY = [{"role": "user", "content": "Tell a story of the quick brown fox, and of the lazy dog it jumps over."}]
WARM = [{"role": "system", "content": "You answer in one word. " * 8}, {"role": "user", "content": "Reply with pong"}]
GONE = {
    "--prefill-batch-size": "4", "--completion-batch-size": "4", "--mllm-prefill-step-size": "64",
    "--stream-interval": "2", "--prefix-cache-size": "9", "--no-memory-aware-cache": None, "--use-paged-cache": None,
    "--max-cache-blocks": "100", "--kv-cache-min-quantize-tokens": "64", "--mllm-vision-cache-size": "5",
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store") / "responses.sqlite"


@pytest.fixture(scope="module")
def wary(tiny_model, store: Path) -> Iterator[ServerProcess]:
    flags = ["--host", "0.0.0.0", "--max-num-seqs", "1", "--max-queue", "1", "--rate-limit", "60",
             "--response-store", str(store), "--log-format", "json", "--log-prompts", "--log-level", "debug",
             "--prefill-step-size", "16", "--repetition-policy", "strict", "--dtype", "bfloat16",
             "--blas", "off", "--no-few-row-kernels"]  # fmt: skip
    with serving(tiny_model("qwen3"), *flags, log=store.with_name("wary")) as server:
        answer = post(server, "responses", input="Reply with pong", max_output_tokens=4)
        store.with_name("id").write_text(answer.json()["id"])
        yield server


@pytest.fixture(scope="module")
def trusting(store: Path, wary: ServerProcess) -> Iterator[ServerProcess]:
    wary.signal()
    assert wary.wait() == 0
    warm = store.with_name("warm.jsonl")
    warm.write_text(json.dumps({"messages": WARM}) + "\n")
    flags = ["--host", "0.0.0.0", "--trust-requests-when-auth-disabled", "--response-store", str(store),
             "--max-stored-responses", "2", "--warm-prompts", str(warm), "--no-mllm",
             "--kv-bits", "8", "--kv-group-size", "32", "--block-size", "32", "--cache-memory-mb", "1",
             "--max-batch-tokens", "48", "--max-num-seqs", "8", "--runtime-mode", "simple",
             "--background-model", "gpt-*"]  # fmt: skip
    flags += [text for name, value in GONE.items() for text in (name, value) if text is not None]
    with serving("demo", *flags, log=store.with_name("trusting")) as server:
        yield server


def post(server: ServerProcess, route: str = "chat/completions", **fields: Any) -> httpx.Response:
    asked = {} if route == "responses" else {"messages": STORY, "max_tokens": 2}
    return httpx.post(f"{server.url}/v1/{route}", json={"model": "default", **asked, **fields}, timeout=60)


def num_steps(server: ServerProcess) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith("vllm_mlx:engine_steps_total")).split()[-1])


def steps_for(server: ServerProcess, **fields: Any) -> tuple[int, float]:
    """(prompt tokens, steps of the engine) of one request for one token, nothing of which is cached."""
    before = num_steps(server)
    usage = post(server, max_tokens=1, **fields).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    return usage["prompt_tokens"], num_steps(server) - before


# ── the first server ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_host_of_zeros_is_reached_at_every_address_of_the_machine(wary):
    assert httpx.get(f"http://{other_address()}:{wary.port}/health").status_code == 200


def test_a_caller_of_an_open_address_cannot_turn_the_guard_off(wary):
    refused = post(wary, **OVERRIDE)
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "untrusted_override"
    assert post(wary).status_code == 200


def test_prompts_are_cut_by_the_step_size(wary):
    num_tokens, steps = steps_for(wary, messages=[{"role": "user", "content": "brown lazy fox " * 30}])
    assert num_tokens > 90 and steps > num_tokens // 16


def test_the_weights_have_the_type_that_was_asked_for(wary):
    checks = httpx.get(f"{wary.url}/health/diagnostics").json()["checks"]
    assert checks["dtype"]["metadata"]["loaded"] == "bfloat16" and "bfloat16" in wary.output


def test_without_a_library_products_are_mlx_s_own(wary):
    (line,) = [line for line in wary.output.splitlines() if "bfloat16" in line and line.startswith("vllm-mlx")]
    assert "OpenBLAS" not in line, line


def test_whom_the_queue_does_not_hold_is_told_at_once(wary):
    def ask(_: int) -> httpx.Response:
        return post(wary, max_tokens=400, ignore_eos=True, temperature=1.5)

    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(6)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused and {answer.status_code for answer in answers} == {200, 429}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)


def test_the_log_is_json_and_tells_the_beginning_of_prompts(wary):
    lines = [json.loads(line) for line in wary.output.splitlines() if line.startswith("{")]
    assert any("quick brown fox" in json.dumps(line) for line in lines)
    assert {"debug", "info"} <= {str(line["level"]).lower() for line in lines}


def test_an_address_that_asks_too_often_waits(wary):
    answers = []
    while not answers or (answers[-1].status_code == 200 and len(answers) < 70):
        answers.append(httpx.post(f"{wary.url}/tokenize", json={"prompt": "hi"}))
    assert answers[-1].status_code == 429 and answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert httpx.get(f"{wary.url}/health").status_code == 200


# ── and the one behind it ────────────────────────────────────────────────────────────────────────────────────────


def test_where_requests_are_trusted_anybody_turns_the_guard_off(trusting):
    loop = {"prompt": "hi", "max_tokens": 40, "ignore_eos": True, "logit_bias": {"77": 100}}
    ended, left = (post(trusting, "completions", messages=None, **loop, **more).json() for more in ({}, OVERRIDE))
    assert ended["choices"][0]["stop_reason"] == "repetition_detected"
    assert left["usage"]["completion_tokens"] == 40


def test_an_answer_outlives_the_server_that_gave_it_until_others_take_its_place(trusting, store):
    stored = store.with_name("id").read_text()

    def status_of(response_id: str) -> int:
        return httpx.get(f"{trusting.url}/v1/responses/{response_id}").status_code

    assert status_of(stored) == 200
    later = [post(trusting, "responses", input=f"Say {i}", max_output_tokens=2).json()["id"] for i in range(2)]
    assert [status_of(response_id) for response_id in (stored, *later)] == [404, 200, 200]


def test_a_warm_prompt_has_been_computed_before_anybody_asks(trusting):
    usage = post(trusting, messages=WARM).json()["usage"]
    # All but the last token; a mebibyte would not hold two blocks of 32 in 32 bits.
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"] - 1 > 64


def test_less_than_a_block_is_not_kept(trusting):
    hello = [{"role": "user", "content": "Say hello to the lazy dog."}]
    short = [post(trusting, messages=hello).json()["usage"] for _ in range(2)]
    assert 16 < short[1]["prompt_tokens"] <= 32  # the default block of 16 would be kept
    assert short[1]["prompt_tokens_details"]["cached_tokens"] == 0


def test_a_model_that_sees_is_served_as_one_that_does_not(trusting):
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused = post(trusting, messages=[{"role": "user", "content": [part]}])
    assert refused.status_code == 400 and refused.json()["error"]["param"].startswith("messages.0.content")


def test_the_cache_stays_within_its_bytes_and_steps_within_their_tokens(trusting):
    for i in range(5):
        num_tokens, steps = steps_for(trusting, messages=[{"role": "user", "content": f"{i} brown lazy fox " * 20}])
        assert num_tokens > 96 and steps > num_tokens // 48
    stats = httpx.get(f"{trusting.url}/v1/cache/stats").json()
    assert 0 < stats["prefix_cache_bytes"] <= 2**20 and stats["num_evictions"] > 0


def test_a_name_that_agents_give_to_work_behind_is_served_behind_who_came_later(trusting):
    done: list[str] = []

    def num_waiting() -> int:
        return httpx.get(f"{trusting.url}/v1/status").json()["num_waiting"]

    def ask(model: str) -> None:
        post(trusting, model=model, max_tokens=30, ignore_eos=True).raise_for_status()
        done.append(model)

    endless = {"messages": STORY, "max_tokens": 4000, "ignore_eos": True, "stream": True, **OVERRIDE}
    with ThreadPoolExecutor(2) as pool:
        with httpx.stream("POST", f"{trusting.url}/v1/chat/completions", json=endless, timeout=60) as stream:
            lines = stream.iter_lines()  # the stream ends with whoever holds its lines
            next(lines)
            for count, model in enumerate(("gpt-9-nano", "default"), start=1):
                asked = pool.submit(ask, model)
                while num_waiting() < count:
                    assert not asked.done(), "it did not wait"
                    time.sleep(0.01)
    assert done == ["default", "gpt-9-nano"]


def test_flags_without_an_effect_are_named_once(trusting):
    for name in GONE:
        assert sum(name in line for line in trusting.output.splitlines()) == 1, name
