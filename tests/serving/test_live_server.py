"""A live server process with a tiny random model: every protocol end to end, one engine under all of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator

import anthropic
import httpx
import openai
import pytest

from tests.api.fakes import sse_payloads
from tests.serving.process import ServerProcess, serving

HI = [{"role": "user", "content": "Hi there"}]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[ServerProcess]:
    log = tmp_path_factory.mktemp("serving") / "log"
    # Several rows from the start, so that joins and leaves happen.
    flags = ["--continuous-batching", "--served-model-name", "tiny", "--repetition-policy", "off"]
    with serving(tiny_model("qwen3"), *flags, log=log) as running:
        yield running
        running.signal()
        assert running.wait() == 0
        assert "Traceback" not in running.output, running.output


def chat(server: ServerProcess, **fields) -> httpx.Response:
    body = {"model": "default", "messages": HI, **GREEDY, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def text_of(response: httpx.Response) -> str:
    return response.json()["choices"][0]["message"]["content"]


def engine_is_idle(server: ServerProcess) -> bool:
    status = httpx.get(f"{server.url}/v1/status").json()
    return status["num_running"] == 0 and status["num_waiting"] == 0 and not status["requests"]


async def until_idle(server: ServerProcess) -> None:
    async with asyncio.timeout(30):
        while not engine_is_idle(server):
            await asyncio.sleep(0.02)


def test_the_announcement_is_a_few_lines_with_a_curl_that_works(server):
    lines = [line for line in server.output.splitlines() if line.startswith(("vllm-mlx", "  "))]
    assert 3 <= len(lines) <= 8
    assert "tiny" in lines[0] and "float32" in lines[0]
    assert any("curl -sS " in line and server.url in line for line in lines)


def test_streaming_and_whole_answers_are_the_same_on_every_protocol(server):
    whole = chat(server)
    streamed = chat(server, stream=True)
    deltas = [c["choices"][0]["delta"].get("content", "") for c in sse_payloads(streamed.text)]
    assert text_of(whole) == "".join(deltas)
    messages = {"model": "x", "max_tokens": 12, "temperature": 0, "top_k": 1, "messages": HI}
    answer = httpx.post(f"{server.url}/v1/messages", json=messages, timeout=60).json()
    counted = httpx.post(f"{server.url}/v1/messages/count_tokens", json=messages).json()["input_tokens"]
    usage = answer["usage"]
    billed = usage["input_tokens"] + usage["cache_creation_input_tokens"] + usage["cache_read_input_tokens"]
    assert billed == counted == whole.json()["usage"]["prompt_tokens"]


def test_greedy_answers_do_not_depend_on_company(server):
    alone = text_of(chat(server))

    async def crowd() -> list[str]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

            async def ask(i: int) -> str | None:
                messages = HI if i % 2 else [{"role": "user", "content": f"Something else {i}"}]
                body = {"model": "default", "messages": messages, **GREEDY}
                answer = await client.post("/v1/chat/completions", json=body)
                return text_of(answer) if i % 2 else None

            return [text for text in await asyncio.gather(*(ask(i) for i in range(12))) if text is not None]

    assert set(asyncio.run(crowd())) == {alone}


def test_a_seed_repeats_its_answer_and_n_choices_differ(server):
    sampled = {"temperature": 1.5, "seed": 7, "n": 3}
    first, second = chat(server, **sampled).json(), chat(server, **sampled).json()
    texts = [c["message"]["content"] for c in first["choices"]]
    assert texts == [c["message"]["content"] for c in second["choices"]] and len(set(texts)) == 3


def test_a_repeated_prompt_comes_from_the_cache(server):
    long = [{"role": "user", "content": "A long text about nothing. " * 40}]
    first = chat(server, messages=long).json()["usage"]
    second = chat(server, messages=long).json()["usage"]
    assert second["prompt_tokens"] == first["prompt_tokens"]
    assert second["prompt_tokens_details"]["cached_tokens"] >= first["prompt_tokens"] - 64
    stats = httpx.get(f"{server.url}/v1/cache/stats").json()
    assert stats["num_hits"] >= 1 and stats["prefix_cache_bytes"] > 0
    cleared = httpx.delete(f"{server.url}/v1/cache").json()
    assert cleared["freed_bytes"] == stats["prefix_cache_bytes"]
    third = chat(server, messages=long).json()["usage"]
    assert third["prompt_tokens_details"]["cached_tokens"] == 0


def test_stop_strings_and_tokens_end_the_answer(server):
    text = text_of(chat(server))
    stop = text[3:6]
    stopped = chat(server, stop=stop).json()["choices"][0]
    assert stopped["message"]["content"] == text[: text.index(stop)]
    assert stopped["finish_reason"] == "stop" and stopped["stop_reason"] == stop


def test_logprobs_belong_to_the_text(server):
    answer = chat(server, logprobs=True, top_logprobs=3).json()["choices"][0]
    content = answer["logprobs"]["content"]
    assert len(content) == 12
    joined = b"".join(bytes(entry["bytes"]) for entry in content).decode(errors="replace")
    assert joined == answer["message"]["content"]
    for entry in content:
        assert entry["logprob"] <= 0 and len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == pytest.approx(max(t["logprob"] for t in entry["top_logprobs"]))


def test_completions_take_token_ids_and_echo_them(server):
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "Once upon"}).json()["tokens"]
    body = {"model": "tiny", "max_tokens": 4, "temperature": 0, "echo": True, "logprobs": 1, "ignore_eos": True}
    by_text = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": "Once upon"}, timeout=60).json()
    by_ids = httpx.post(f"{server.url}/v1/completions", json={**body, "prompt": tokens}, timeout=60).json()
    assert by_text["choices"][0]["text"] == by_ids["choices"][0]["text"]
    assert by_text["choices"][0]["text"].startswith("Once upon")
    scores = by_text["choices"][0]["logprobs"]["token_logprobs"]
    assert len(scores) == len(tokens) + 4 and scores[0] is None and all(s <= 0 for s in scores[1:])
    back = httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json()
    assert back == {"prompt": "Once upon"}


def test_a_structured_answer_has_its_shape(server):
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}}
    answer = chat(server, response_format=shape, max_tokens=200, ignore_eos=False, enable_thinking=False).json()[
        "choices"
    ][0]
    if answer["finish_reason"] == "stop":
        assert set(json.loads(answer["message"]["content"])) == {"n"}
    chosen = chat(server, guided_choice=["left", "right"], ignore_eos=False, enable_thinking=False)
    assert text_of(chosen) in ("left", "right")


def test_an_over_long_prompt_is_a_400_with_both_counts(server):
    response = chat(server, messages=[{"role": "user", "content": "word " * 9000}])
    error = response.json()["error"]
    assert response.status_code == 400 and error["code"] == "context_length_exceeded" and "4096" in error["message"]
    body = {"model": "x", "max_tokens": 5, "messages": [{"role": "user", "content": "word " * 9000}]}
    told = httpx.post(f"{server.url}/v1/messages", json=body).json()
    assert told["error"]["message"].startswith("prompt is too long: ")


def test_a_request_that_takes_too_long_is_504_whole_and_an_error_event_streamed(server):
    slow = {"max_tokens": 4000, "timeout": 0.2}
    assert chat(server, **slow).status_code == 504
    last = sse_payloads(chat(server, stream=True, **slow).text)[-1]
    assert last["error"]["code"] == "timeout"
    asyncio.run(until_idle(server))


def test_the_official_packages_talk_to_it(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(model="default", messages=HI, max_tokens=5)
        assert answer.usage.completion_tokens <= 5 and answer.model == "tiny"
        with client.chat.completions.create(model="default", messages=HI, max_tokens=5, stream=True) as stream:
            assert [c for c in stream][-1].choices[0].finish_reason in ("stop", "length")
        assert [m.id for m in client.models.list()] == ["tiny", "default"]
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        with client.messages.stream(model="default", max_tokens=5, messages=HI) as stream:
            assert stream.get_final_message().usage.output_tokens <= 5


def test_clients_that_leave_at_random_leave_nothing_behind(server):
    async def storm() -> None:
        limits = httpx.Limits(max_connections=64)
        async with httpx.AsyncClient(base_url=server.url, timeout=60, limits=limits) as client:

            async def come_and_go(i: int) -> None:
                body = {"model": "x", "messages": HI, "max_tokens": 2000, "ignore_eos": True, "stream": i % 3 != 0}
                try:
                    async with asyncio.timeout(0.02 + (i * 37 % 50) / 50):
                        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
                            async for _ in response.aiter_raw():
                                pass
                except TimeoutError:
                    pass

            await asyncio.gather(*(come_and_go(i) for i in range(48)))
        await until_idle(server)

    asyncio.run(storm())
    status = httpx.get(f"{server.url}/v1/status").json()
    assert (
        status["runtime"]["active_concurrency"] == 0
        and status["cache"]["kv_bytes"] <= status["cache"]["kv_budget_bytes"]
    )
    assert text_of(chat(server))


def test_a_running_request_is_seen_and_cancelled_by_its_id(server):
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {"model": "x", "messages": HI, "max_tokens": 4000, "ignore_eos": True}
            answer = asyncio.create_task(
                client.post("/v1/chat/completions", json=body, headers={"x-request-id": "stop-me"})
            )
            async with asyncio.timeout(30):
                while not any(
                    r["x_request_id"] == "stop-me" and r.get("completion_tokens", 0) > 4
                    for r in (await client.get("/v1/status")).json()["requests"]
                ):
                    await asyncio.sleep(0.01)
            assert (await client.post("/v1/requests/stop-me/cancel")).status_code == 200
            choice = (await answer).json()["choices"][0]
            assert choice["stop_reason"] == "cancelled" and choice["message"]["content"]

    asyncio.run(run())


def test_metrics_and_diagnostics_tell_of_what_happened(server):
    text = httpx.get(f"{server.url}/metrics").text
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    numbers = {name.partition("{")[0]: value for name, value in samples}
    assert float(numbers["vllm:generation_tokens_total"]) > 0 and float(numbers["vllm:num_requests_running"]) == 0
    assert float(numbers["vllm:time_to_first_token_seconds_count"]) > 0
    body = httpx.get(f"{server.url}/health/diagnostics").json()
    assert body["checks"]["engine"]["status"] == "pass", body
    shown = chat(server, include_diagnostics=True, diagnostics_level="deep").json()["diagnostics"]
    assert shown["timings_ms"]["total"] > 0 and shown["sampling"]["temperature"] == {"value": 0.0, "source": "request"}
    assert "runtime" in shown and shown["level"] == "deep"


def test_health_is_answered_while_the_engine_is_busy(server):
    async def run() -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {"model": "x", "messages": HI, "max_tokens": 1500, "ignore_eos": True}
            busy = [asyncio.create_task(client.post("/v1/chat/completions", json=body)) for _ in range(4)]
            for _ in range(20):
                assert (await client.get("/health")).status_code == 200
            for task in busy:
                task.cancel()
            await asyncio.gather(*busy, return_exceptions=True)
        await until_idle(server)

    asyncio.run(run())


def test_the_log_holds_no_error(server):
    assert server.process.poll() is None
    assert " ERROR " not in server.output and "Traceback" not in server.output, server.output
