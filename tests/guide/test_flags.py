"""Flags of the guide and of the reference whose effect is seen, not read back: three servers with many flags each."""

from __future__ import annotations

import json
import ssl
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.guide.test_same_answer import image
from tests.serving.process import ServerProcess, serving

STORY = [{"role": "user", "content": "Tell a story."}]
HOT = {"temperature": 1.9, "top_p": 1.0}
ROUTES = ("chat/completions", "completions", "messages", "responses")
TLS = Path(__file__).parents[1] / "data" / "tls"


def body(route: str, **fields: Any) -> dict[str, Any]:
    """The same request for every route."""
    text = "Tell a story."
    asked = {"completions": {"prompt": text, "ignore_eos": True}, "responses": {"input": text, "store": False}}.get(
        route, {"messages": STORY}
    )
    return {"model": "default", **asked, **fields}


def post(server: ServerProcess, route: str, **fields: Any) -> dict[str, Any]:
    response = httpx.post(f"{server.url}/v1/{route}", json=body(route, **fields), timeout=120)
    assert response.status_code == 200, response.text
    return response.json()


def text_of(answer: dict[str, Any]) -> str:
    """What was said, on whatever route, reasoning included."""
    if "choices" in answer:
        choice = answer["choices"][0]
        message = choice.get("message") or {"content": choice["text"]}
        return (message.get("reasoning_content") or "") + (message["content"] or "")
    parts = answer.get("content") or [p for item in answer["output"] for p in item.get("content") or item["summary"]]
    return "".join(part.get("thinking") or part.get("text") or "" for part in parts)


def events(streamed: httpx.Response) -> list[dict[str, Any]]:
    """The payloads of a stream in any protocol, in order."""
    lines = (line[5:].strip() for line in streamed.text.splitlines() if line.startswith("data:"))
    return [json.loads(line) for line in lines if line != "[DONE]"]


def num_completion_tokens(answer: dict[str, Any]) -> int:
    usage = answer["usage"]
    return usage.get("completion_tokens") or usage.get("output_tokens")


@pytest.fixture(scope="module")
def defaults(tmp_path_factory) -> Iterator[ServerProcess]:
    flags = [
        "--default-top-k", "1", "--default-min-p", "0.0", "--default-chat-template-kwargs", '{"enable_thinking": true}',
        "--default-frequency-penalty", "0.5", "--frequency-penalty-mode", "repetition",
        "--max-tokens", "5", "--continuous-batching", "--max-num-seqs", "2", "--disable-prefix-cache",
        "--cache-strategy", "paged", "--repetition-policy", "strict", "--timeout", "60",
        "--max-thinking-tokens", "30", "--encoder-cache-mb", "0",
    ]  # fmt: skip
    with serving("demo", *flags, log=tmp_path_factory.mktemp("defaults") / "log") as server:
        yield server


@pytest.mark.parametrize("route", ROUTES)
def test_a_default_of_the_server_holds_on_every_route_until_the_request_says_otherwise(defaults, route):
    limit = {"max_output_tokens" if route == "responses" else "max_tokens": 12}
    by_flag = {text_of(post(defaults, route, **HOT, **limit)) for _ in range(3)}
    assert len(by_flag) == 1, "top_k 1 leaves no choice"
    if route != "responses":  # it has no top_k
        boiling = {**HOT, "temperature": 20.0}  # at 1.9 four answers may well be the same
        own = {text_of(post(defaults, route, **boiling, **limit, top_k=0)) for _ in range(4)}
        assert len(own) > 1


@pytest.mark.parametrize("route", [route for route in ROUTES if route != "messages"])
def test_max_tokens_is_what_a_request_gets_that_names_none(defaults, route):
    assert num_completion_tokens(post(defaults, route)) <= 5
    assert num_completion_tokens(post(defaults, route, include_diagnostics=True)) <= 5


def test_template_kwargs_of_the_server_make_it_think_until_the_request_says_otherwise(defaults):
    ask = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "max_tokens": 60, "temperature": 0}
    thought = post(defaults, "chat/completions", **ask)["choices"][0]["message"]
    plain = post(defaults, "chat/completions", **ask, enable_thinking=False)["choices"][0]["message"]
    assert thought["reasoning_content"] and not plain.get("reasoning_content")


def test_reasoning_ends_at_the_servers_limit_and_the_answer_follows(defaults):
    ask = {"messages": [{"role": "user", "content": "What is 312 + 145?"}], "max_tokens": 60, "temperature": 0}
    answer = post(defaults, "chat/completions", **ask)  # it would think for 45
    assert 0 < answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 30
    assert answer["choices"][0]["message"]["content"]


def test_a_frequency_penalty_of_old_is_a_repetition_penalty(defaults):
    # Two tokens so close that the first is taken until it is punished.
    ask = {"temperature": 0, "max_tokens": 12, "logit_bias": {"77": 50, "78": 49}, "repetition_policy_override": "off"}
    neutral = {"frequency_penalty": 0, "repetition_penalty": 1.0}
    by_flag, by_name, plain = (
        text_of(post(defaults, "completions", **ask, **fields))
        for fields in ({}, {**neutral, "repetition_penalty": 1.5}, neutral)
    )
    assert by_flag == by_name != plain


def test_without_room_for_them_pictures_are_encoded_each_time(defaults):
    messages = [{"role": "user", "content": [image("red")]}]
    runs = []
    for _ in range(3):
        post(defaults, "chat/completions", messages=messages)
        runs.append(httpx.get(f"{defaults.url}/v1/cache/stats").json()["num_encoder_runs"])
    assert runs[2] - runs[1] == runs[1] - runs[0] == 1


@pytest.mark.parametrize("level", ["basic", "deep"])
@pytest.mark.parametrize("route", ROUTES)
def test_diagnostics_are_in_the_last_chunk_of_every_route_and_in_the_whole_answer(defaults, route, level):
    limit = {"max_output_tokens" if route == "responses" else "max_tokens": 4}
    whole = post(defaults, route, **limit, diagnostics_level=level)["diagnostics"]
    streamed = httpx.post(
        f"{defaults.url}/v1/{route}", json=body(route, **limit, diagnostics_level=level, stream=True), timeout=60
    )
    *before, last = [event for event in events(streamed) if event.get("type") != "message_stop"]
    assert not any("diagnostics" in p for p in before)
    shown = (last.get("response") or last)["diagnostics"]
    for diagnostics in (whole, shown):
        assert diagnostics["level"] == level and ("runtime" in diagnostics) == (level == "deep")
        assert diagnostics["timings_ms"]["total"] > 0 and diagnostics["context_utilization_pct"] > 0
        assert diagnostics["sampling"]["top_k"] == {"value": 1, "source": "flag"}
        assert diagnostics["sampling"]["repetition_penalty"] == {"value": 1.5, "source": "frequency_penalty_mode"}
        assert diagnostics["cache"]["miss_reason"] == "the prefix cache is not used"
    if level == "deep":
        assert shown["runtime"]["repetition_policy"] == "strict" and shown["runtime"]["rows"]["max_rows"] == 2


def test_a_disabled_prefix_cache_reuses_nothing_and_a_strategy_of_old_is_explained(defaults):
    for _ in range(2):
        usage = post(defaults, "chat/completions")["usage"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == 0
    assert httpx.get(f"{defaults.url}/v1/cache/stats").json()["prefix_cache_bytes"] == 0
    assert defaults.output.count("--cache-strategy paged makes no difference") == 1


def test_max_num_seqs_bounds_what_is_computed_together(defaults):
    def rows(_: int) -> int:
        answer = post(defaults, "completions", max_tokens=80, ignore_eos=True, diagnostics_level="deep",
                      repetition_policy_override="off")  # fmt: skip
        return answer["diagnostics"]["runtime"]["max_batch_rows"]

    with ThreadPoolExecutor(5) as pool:
        assert max(pool.map(rows, range(5))) == 2


def test_a_loop_is_ended_and_named_unless_a_trusted_request_says_otherwise(defaults):
    loop = {"prompt": "hi", "max_tokens": 40, "ignore_eos": True, "logit_bias": {"77": 100}}
    ended = post(defaults, "completions", **loop)["choices"][0]
    assert ended["stop_reason"] == "repetition_detected" and ended["stop_reason_detail"] == "single_token_run"
    left = post(defaults, "completions", **loop, repetition_policy_override="off")
    assert left["choices"][0]["finish_reason"] == "length" and num_completion_tokens(left) == 40
    check = httpx.get(f"{defaults.url}/health/diagnostics").json()["checks"]["repetition"]["metadata"]
    assert check["interventions_total"] >= 1 and check["interventions"]["single_token_run"] >= 1


@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_a_time_out_ends_a_stream_with_an_error_event_and_done(defaults, route):
    fields = {"stream": True, "timeout": 1, "repetition_policy_override": "off", "ignore_eos": True}
    endless = body(route, **fields, max_tokens=8000)
    streamed = httpx.post(f"{defaults.url}/v1/{route}", json=endless, timeout=60)
    assert streamed.status_code == 200, streamed.text
    assert "1 seconds" in events(streamed)[-1]["error"]["message"]
    assert streamed.text.rstrip().endswith("data: [DONE]")


@pytest.mark.parametrize("route", ROUTES)
def test_a_time_out_before_the_answer_is_504_on_every_route(defaults, route):
    limit = {"max_output_tokens" if route == "responses" else "max_tokens": 4}
    answer = httpx.post(f"{defaults.url}/v1/{route}", json=body(route, **limit, timeout=1e-6), timeout=60)
    assert answer.status_code == 504 and "1e-06 seconds" in answer.json()["error"]["message"]


# ── keys, caches, limits ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def keyed(tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("keyed")
    (folder / "keys").write_text("# who may call\nalice: sk-a\nbob: sk-b\ncarol: sk-c\n")
    flags = [
        "--api-key-file", str(folder / "keys"), "--rate-limit", "12", "--runtime-mode-threshold", "3",
        "--reasoning-parser", "none", "--disable-auto-tool-choice", "--system-turns", "front", "--sort-tools",
        "--keep-volatile-lines",
    ]  # fmt: skip
    with serving("demo", *flags, log=folder / "log") as server:
        yield server


def ask_as(server: ServerProcess, key: str, messages: list[dict[str, str]], **fields: Any) -> httpx.Response:
    asked = {"model": "default", "messages": messages, "max_tokens": 2, "include_diagnostics": True, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=asked, headers={"x-api-key": key}, timeout=60)


def conversation(second: str) -> list[dict[str, str]]:
    first = "Here is a long first message, long enough to fill a block or two of the prefix cache with its tokens."
    return [{"role": "user", "content": first}, {"role": "assistant", "content": second},
            {"role": "user", "content": "Reply with pong"}]  # fmt: skip


def test_each_key_has_a_prefix_cache_of_its_own_and_a_miss_names_its_message(keyed):
    ask_as(keyed, "sk-a", conversation("yes")).raise_for_status()
    cached = {key: ask_as(keyed, key, conversation("yes")).json()["diagnostics"]["cache"] for key in ("sk-a", "sk-b")}
    assert cached["sk-a"]["cached_tokens"] > 0 and cached["sk-b"]["cached_tokens"] == 0
    changed = ask_as(keyed, "sk-a", conversation("no, never")).json()["diagnostics"]["cache"]
    assert changed["first_new_message"] == 1 and f"token {changed['first_new_token']} " in changed["miss_reason"]
    assert "sk-" not in keyed.output


def test_auto_widens_at_the_threshold_and_not_before(keyed):
    def widened() -> int:
        headers = {"x-api-key": "sk-a"}
        shown = httpx.get(f"{keyed.url}/health/diagnostics", headers=headers).json()["checks"]["runtime_mode"]
        return shown["metadata"]["times_widened"]

    slow = {"max_tokens": 150, "ignore_eos": True, "repetition_policy_override": "off"}
    for count, wide in ((2, 0), (3, 1)):
        with ThreadPoolExecutor(count) as pool:
            answers = list(pool.map(lambda _: ask_as(keyed, "sk-b", STORY, **slow), range(count)))
        assert all(answer.status_code == 200 for answer in answers), answers[0].text
        assert widened() == wide


def test_with_no_parser_reasoning_and_calls_are_text(keyed):
    question = [{"role": "user", "content": "What is 2 plus 3?"}]
    message = ask_as(keyed, "sk-c", question, enable_thinking=True, max_tokens=80).json()["choices"][0]["message"]
    assert "</think>" in message["content"] and not message.get("reasoning_content")
    weather = [{"role": "user", "content": "What is the weather in Paris?"}]
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}}}}  # fmt: skip
    choice = ask_as(keyed, "sk-c", weather, tools=[tool], temperature=0, max_tokens=80).json()["choices"][0]
    assert not choice["message"].get("tool_calls") and choice["finish_reason"] == "stop"
    assert "get_weather" in choice["message"]["content"]


def test_prompts_of_agents_are_arranged_as_the_flags_say(keyed):
    def prompt(*turns: tuple[str, str], **fields: Any) -> list[int]:
        asked = {"messages": [{"role": role, "content": text} for role, text in turns], **fields}
        answer = httpx.post(f"{keyed.url}/tokenize", json=asked, headers={"x-api-key": "sk-c"}, timeout=60)
        return answer.raise_for_status().json()["tokens"]

    hi, system, more = ("user", "Hi"), ("system", "Be brief."), ("user", "And?")
    assert prompt(hi, system, more) == prompt(system, hi, more)  # --system-turns front
    tools = [{"type": "function", "function": {"name": name}} for name in ("b", "a")]
    assert prompt(hi, tools=tools) == prompt(hi, tools=tools[::-1])  # --sort-tools
    counted = ("system", "<total_tokens>12 tokens left</total_tokens>")
    assert prompt(hi, counted, more) != prompt(hi, more)  # --keep-volatile-lines


def test_the_rate_limit_holds_for_a_key_and_not_for_its_neighbour(keyed):
    answers = [ask_as(keyed, "sk-a", STORY, max_tokens=1) for _ in range(12)]
    assert answers[0].status_code == 200 and answers[-1].status_code == 429
    assert int(answers[-1].headers["retry-after"]) >= 1
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert ask_as(keyed, "sk-b", STORY, max_tokens=1).status_code == 200
    assert httpx.get(f"{keyed.url}/health").status_code == 200


def test_a_shared_cache_serves_every_key_over_tls(tmp_path):
    (tmp_path / "keys").write_text("sk-a\nsk-b\n")
    files = ["--ssl-certfile", str(TLS / "localhost.pem"), "--ssl-keyfile", str(TLS / "localhost-locked.key"),
             "--ssl-keyfile-password", "only-of-tests"]  # fmt: skip
    flags = [*files, "--api-key-file", str(tmp_path / "keys"), "--shared-cache"]
    trusted = ssl.create_default_context(cafile=TLS / "localhost.pem")
    with serving("demo", *flags, log=tmp_path / "log", verify=trusted) as server, httpx.Client(verify=trusted) as http:
        cached = []
        for key in ("sk-a", "sk-b"):
            answer = http.post(f"{server.url}/v1/chat/completions", headers={"authorization": f"Bearer {key}"},
                               json={"model": "m", "messages": conversation("yes"), "max_tokens": 1})  # fmt: skip
            cached.append(json.loads(answer.text)["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert cached[0] == 0 and cached[1] > 0
        assert f"https://127.0.0.1:{server.port}/v1" in server.output and "only-of-tests" not in server.output
