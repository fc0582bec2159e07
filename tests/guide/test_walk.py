"""The operator guide from section 1 to 11: its commands and requests as written, and the effect of each seen.

Model names are replaced by the demo model, paths by this checkout. One server process per profile, shared by its tests.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from PIL import Image

from tests.api.fakes import sse_payloads
from tests.serving.process import ServerProcess, other_address, serving

CHECKOUT = Path(__file__).parents[2]
LISTEN = ["--localhost"]
KEY = {"authorization": "Bearer sk-guide"}
PROFILES = {
    "A": [*LISTEN, "--runtime-mode", "simple", "--cache-strategy", "auto", "--default-temperature", "0.7",
          "--default-top-p", "0.9"],
    "B": [*LISTEN, "--deterministic"],
    "C": [*LISTEN, "--runtime-mode", "auto", "--cache-strategy", "auto", "--enable-auto-tool-choice",
          "--tool-call-parser", "auto", "--strict-model-id", "--api-key", "sk-guide"],
    "D": [*LISTEN, "--runtime-mode", "simple", "--cache-strategy", "auto", "--mllm", "--default-temperature", "0.0",
          "--default-top-p", "1.0"],
    "E": [*LISTEN, "--runtime-mode", "auto", "--cache-strategy", "auto", "--mllm", "--batch-divergence-monitor",
          "--batch-divergence-threshold", "0.95", "--batch-divergence-action", "serialize",
          # Section 11's remedies, and an interval in which a test sees a probe.
          "--batch-divergence-interval", "0.1", "--memory-monitor-interval", "0.1"],
    "F": [*LISTEN, "--runtime-mode", "simple", "--cache-strategy", "auto", "--timeout", "900",
          "--default-temperature", "0.7", "--default-top-p", "0.9"],
}  # fmt: skip
PONG = [{"role": "user", "content": "Reply with pong"}]
SENTENCE = {
    "messages": [{"role": "user", "content": "Reply with exactly one sentence."}],
    "enable_thinking": False, "temperature": 0.0, "top_p": 1.0, "max_tokens": 32,
}  # fmt: skip
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {
        "type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"],
        "additionalProperties": False}},
}  # fmt: skip


@pytest.fixture(scope="module")
def profile(tmp_path_factory) -> Iterator[Callable[[str], ServerProcess]]:
    """`profile("A")` is the running server of that profile, started once."""
    with_servers: dict[str, tuple[object, ServerProcess]] = {}
    folder = tmp_path_factory.mktemp("guide")

    def get(letter: str) -> ServerProcess:
        if letter not in with_servers:
            # --localhost must win over what the environment says.
            manager = serving(
                "demo", *PROFILES[letter], log=folder / letter, environment={"VLLM_MLX_HOST": "0.0.0.0"}
            )
            with_servers[letter] = (manager, manager.__enter__())
        return with_servers[letter][1]

    yield get
    for manager, _ in with_servers.values():
        manager.__exit__(None, None, None)  # type: ignore[attr-defined]


def chat(server: ServerProcess, headers: dict[str, str] | None = None, **fields) -> httpx.Response:
    body = {"model": "default", "messages": PONG, "max_tokens": 32, **fields}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60)


def text_of(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def sampling_of(server: ServerProcess, **fields) -> dict:
    return chat(server, include_diagnostics=True, **fields).json()["diagnostics"]["sampling"]


def picture(folder: Path, colour: str) -> dict:
    path = folder / f"{colour}.png"
    Image.new("RGB", (64, 64), colour).save(path)
    return {"role": "user", "content": [
        {"type": "text", "text": "Describe the image in one short sentence."},
        {"type": "image_url", "image_url": {"url": str(path)}}]}  # fmt: skip


# ── 1 to 3: which program, and its model ─────────────────────────────────────────────────────────────────────────


def test_the_interpreter_that_runs_the_package_is_named():
    command = [sys.executable, "-c", "import vllm_mlx, sys; print(sys.executable)"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT).stdout.strip()
    assert shown == sys.executable


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_the_module_entry_point_answers(word):
    command = [sys.executable, "-m", "vllm_mlx.cli", word]
    result = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    assert "vllm-mlx" in result.stdout


def test_download_takes_the_guides_controls_and_offline_never_asks_the_network(tmp_path):
    command = [sys.executable, "-m", "vllm_mlx.cli", "download", "some-owner/some-model",
               "--download-timeout", "5", "--download-retries", "1", "--offline"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT,
                            env={"HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"})  # fmt: skip
    assert result.returncode == 1 and len(result.stderr.strip().splitlines()) == 1
    assert "offline" in result.stderr and "some-owner/some-model" in result.stderr


def test_enable_thinking_is_refused_as_a_flag_and_said_to_be_a_request_field():
    command = [sys.executable, "-m", "vllm_mlx.cli", "serve", "demo", "--enable-thinking"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert result.returncode == 2 and "request field" in result.stderr


# ── A: text, and 6, 7: the quick checks and the smoke tests ──────────────────────────────────────────────────────


def test_localhost_is_reached_on_this_machine_only(profile):
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{other_address()}:{profile('A').port}/health", timeout=5)


def test_health_models_and_capabilities_answer(profile):
    url = profile("A").url
    assert httpx.get(f"{url}/health").json()["status"] == "healthy"
    assert {"demo", "default"} <= {m["id"] for m in httpx.get(f"{url}/v1/models").json()["data"]}
    assert httpx.get(f"{url}/v1/capabilities").json()["model_name"] == "demo"


def test_the_diagnostics_say_which_program_this_is_and_what_is_wrong_with_the_model(profile):
    shown = httpx.get(f"{profile('A').url}/health/diagnostics").json()
    assert shown["program"]["interpreter"] == sys.executable and "--runtime-mode simple" in shown["program"]["command"]
    checks = shown["checks"]
    assert {"dtype", "eos", "chat_template", "memory", "version", "batch_divergence", "repetition"} <= set(checks)
    assert checks["dtype"]["metadata"]["loaded"] in checks["dtype"]["detail"]
    assert checks["eos"]["status"] == checks["chat_template"]["status"] == "pass"
    assert "hello" in checks["chat_template"]["metadata"]["prompt"] and checks["eos"]["metadata"]["eos_token_ids"]


def test_profile_a_samples_by_its_flags_and_a_request_overrides_them(profile):
    shown = sampling_of(profile("A"))
    assert shown["temperature"] == {"value": 0.7, "source": "flag"}
    assert shown["top_p"] == {"value": 0.9, "source": "flag"}
    assert sampling_of(profile("A"), temperature=0.0)["temperature"] == {"value": 0.0, "source": "request"}
    seeds = {text_of(chat(profile("A"), messages=[{"role": "user", "content": "Tell a story."}], seed=s,
                          ignore_eos=True)) for s in range(4)}  # fmt: skip
    greedy = {text_of(chat(profile("A"), messages=[{"role": "user", "content": "Tell a story."}], seed=s,
                           ignore_eos=True, temperature=0.0)) for s in range(2)}  # fmt: skip
    assert len(seeds) > 1 and len(greedy) == 1


def test_the_smoke_tests_of_text(profile):
    assert "pong" in text_of(chat(profile("A"), temperature=0.0)).lower()
    message = chat(profile("A"), **SENTENCE).json()["choices"][0]["message"]
    assert message["content"] and not message.get("reasoning_content")


def test_simple_computes_one_row_at_a_time(profile):
    with ThreadPoolExecutor(4) as pool:
        # Long enough to meet, however late a busy machine starts the last of them.
        list(pool.map(lambda _: chat(profile("A"), ignore_eos=True, max_tokens=150), range(4)))
    rows = httpx.get(f"{profile('A').url}/health/diagnostics").json()["checks"]["runtime_mode"]["metadata"]
    assert rows["mode"] == "simple" and rows["row_limit"] == 1 and rows["max_rows"] == 1
    assert rows["peak_concurrency"] >= 2 and rows["times_widened"] == 0


# ── B to F ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_profile_b_gives_the_same_answer_whatever_the_request_says(profile):
    hot = {"messages": [{"role": "user", "content": "Tell a story."}], "temperature": 1.9}
    assert len({text_of(chat(profile("B"), **hot, seed=s)) for s in range(3)}) == 1
    assert sampling_of(profile("B"), **hot)["temperature"] == {"value": 0.0, "source": "deterministic"}


def test_profile_c_asks_for_the_key_in_either_header_and_leaves_health_open(profile):
    server = profile("C")
    assert chat(server, model="demo").status_code == 401
    for headers in (KEY, {"x-api-key": "sk-guide"}):
        assert chat(server, headers, model="demo").status_code == 200
    assert httpx.get(f"{server.url}/health").status_code == 200
    assert httpx.get(f"{server.url}/health/diagnostics").status_code == 401


def test_profile_c_takes_the_exact_model_id_only(profile):
    assert chat(profile("C"), KEY, model="default").status_code == 404


def test_profile_c_answers_with_structured_tool_calls(profile):
    answer = chat(profile("C"), KEY, model="demo", tools=[WEATHER], tool_choice="required", temperature=0.0,
                  messages=[{"role": "user", "content": "What is the weather in Paris?"}], max_tokens=128)  # fmt: skip
    choice = answer.json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    function = choice["message"]["tool_calls"][0]["function"]
    assert function["name"] == "get_weather" and set(json.loads(function["arguments"])) == {"city"}


def test_profile_e_replays_finished_requests_and_reports_their_agreement(profile, tmp_path):
    server = profile("E")

    def replays() -> dict:
        return httpx.get(f"{server.url}/health/diagnostics").json()["checks"]["batch_divergence"]["metadata"]

    seen, until = replays(), time.monotonic() + 90
    while not seen["sample_count"] and time.monotonic() < until:
        # On a busy machine three requests may happen to come one after the other; then nothing was batched.
        with ThreadPoolExecutor(3) as pool:
            colours = ("red", "blue", "green")
            list(pool.map(lambda c: chat(server, messages=[picture(tmp_path, c)], temperature=0.0), colours))
        soon = time.monotonic() + 5
        while not (seen := replays())["sample_count"] and time.monotonic() < soon:
            time.sleep(0.05)
    assert seen["enabled"] and seen["action"] == "serialize" and seen["threshold"] == 0.95
    assert seen["sample_count"] >= 1 and 0 <= seen["agreement"] <= 1


def test_profile_f_answers_json_and_reports_its_timeout(profile):
    answer = chat(profile("F"), response_format={"type": "json_schema", "json_schema": {
        "name": "n", "strict": True, "schema": WEATHER["function"]["parameters"]}}, max_tokens=200)  # fmt: skip
    if answer.json()["choices"][0]["finish_reason"] == "stop":
        assert set(json.loads(text_of(answer))) == {"city"}
    limits = httpx.get(f"{profile('F').url}/v1/capabilities").json()["limits"]
    assert limits["default_timeout_seconds"] == 900


def test_g_thinking_is_toggled_by_the_request(profile):
    ask = {"messages": [{"role": "user", "content": "What is 2 plus 3?"}], "max_tokens": 200, "temperature": 0.0}
    on, off = (chat(profile("D"), **ask, enable_thinking=e).json()["choices"][0]["message"] for e in (True, False))
    assert on["reasoning_content"] and not off.get("reasoning_content")


# ── 8: SemaChat's order ──────────────────────────────────────────────────────────────────────────────────────────


def test_semachat_1_and_2_text_whole_and_streamed_are_the_same(profile):
    whole = text_of(chat(profile("D")))
    streamed = chat(profile("D"), stream=True)
    assert streamed.text.rstrip().endswith("data: [DONE]")
    chunks = sse_payloads(streamed.text)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == whole
    assert "pong" in whole.lower()


def test_semachat_3_a_system_prompt_is_part_of_the_prompt(profile):
    system = [{"role": "system", "content": "Always answer in upper case."}, *PONG]
    plain, told = chat(profile("D")).json(), chat(profile("D"), messages=system).json()
    assert told["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    assert told["choices"][0]["message"]["content"] != plain["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fields", [{}, {"enable_thinking": False}])
def test_semachat_4_and_5_an_image_is_seen(profile, tmp_path, fields):
    answers = [
        chat(profile("D"), messages=[picture(tmp_path, colour)], include_diagnostics=True, **fields).json()
        for colour in ("red", "blue")
    ]
    assert all(a["diagnostics"]["visual_inputs"] == 1 for a in answers)
    first, second = (a["choices"][0]["message"]["content"] for a in answers)
    assert first and second and first != second


def test_semachat_6_frequency_penalty_and_max_tokens_are_honoured(profile):
    ask = {"messages": [{"role": "user", "content": "Say hi hi hi hi hi"}], "ignore_eos": True, "max_tokens": 24}
    assert text_of(chat(profile("D"), **ask)) != text_of(chat(profile("D"), **ask, frequency_penalty=2.0))
    short = chat(profile("D"), **{**ask, "max_tokens": 5}).json()
    assert short["usage"]["completion_tokens"] == 5 and short["choices"][0]["finish_reason"] == "length"


# ── 9: the evidence of a run ─────────────────────────────────────────────────────────────────────────────────────


def test_record_writes_what_every_reported_run_must_say(profile, tmp_path):
    server, payload, out = profile("C"), tmp_path / "payload.json", tmp_path / "notes" / "run-1"
    payload.write_text(json.dumps({
        "model": "demo", "max_tokens": 200, "temperature": 0.0, "tools": [WEATHER], "tool_choice": "required",
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}]}))  # fmt: skip
    command = [sys.executable, "-m", "vllm_mlx.cli", "record", str(out), "--payload", str(payload),
               "--server", server.url, "--api-key", "sk-guide", "--client", "SemaChat", "--repeat", "2"]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=CHECKOUT)
    assert result.returncode == 0, result.stderr
    made = json.loads(out.with_suffix(".json").read_text())
    assert made["model"] == "demo" and made["revision"] and made["client"] == "SemaChat"
    assert made["interpreter"] == sys.executable and str(CHECKOUT) in made["install"]
    assert "vllm_mlx.cli serve demo" in made["command"] and "--strict-model-id" in made["command"]
    assert "sk-guide" not in json.dumps(made)
    for run in made["runs"]:
        usage = run["answer"]["usage"]
        assert usage["prompt_tokens"] > 0 and usage["completion_tokens"] > 0
        assert 0 < run["answer"]["first_s"] <= run["answer"]["total_s"]
        assert run["format_fault"] == "" and run["reasoning_leak"] is None
    shown = out.with_suffix(".md").read_text()
    assert "SemaChat" in shown and "get_weather" in shown and "as asked" in shown


# ── 11: troubleshooting ──────────────────────────────────────────────────────────────────────────────────────────


def test_the_servers_of_this_walk_logged_no_error(profile):
    for letter in PROFILES:
        output = profile(letter).output
        assert "Traceback" not in output and " ERROR " not in output, output
