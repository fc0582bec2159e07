"""The guards' flags on a real server: what a client and an operator see of memory, row limit, loops and replays.

Thresholds of a fraction of a percent make the server's own few hundred MiB count as too much.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.serving.process import ServerProcess, serving
from vllm_mlx.bench.model import build

SHORT_OF_MEMORY = (
    "--memory-warn-threshold", "0.01", "--memory-limit-threshold", "0.2", "--memory-monitor-interval", "0.1",
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("model"), "5m")


def ask(server: ServerProcess, text: str = "hello", max_tokens: int = 4, **more: Any) -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": max_tokens, "temperature": 0, **more}
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)


def check(server: ServerProcess, name: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health/diagnostics").json()["checks"][name]


def wait_for(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < limit, "it did not come"
        time.sleep(0.05)


def test_reject_new_answers_503_with_retry_after_and_numbers(model: Path, tmp_path: Path) -> None:
    with serving(model, *SHORT_OF_MEMORY, "--memory-action", "reject-new", log=tmp_path / "log") as server:
        wait_for(lambda: check(server, "memory")["metadata"]["pressure"] == "critical")
        answer = ask(server)
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1
        assert "--memory-limit-threshold 0.2" in answer.json()["error"]["message"]
        assert httpx.get(f"{server.url}/health").status_code == 200
        assert check(server, "memory")["status"] == "warning" and "memory is critical" in server.output


def test_reduce_context_refuses_what_fitted_before_and_says_so(model: Path, tmp_path: Path) -> None:
    flags = (*SHORT_OF_MEMORY, "--memory-action", "reduce-context", "--effective-context-tokens", "100")
    with serving(model, *flags, log=tmp_path / "log") as server:
        wait_for(lambda: check(server, "memory")["metadata"]["pressure"] == "critical")
        answer = ask(server, "word " * 40)
        error = answer.json()["error"]
        assert answer.status_code == 400 and error["code"] == "context_length_exceeded"
        assert "50" in error["message"] and "memory" in error["message"]
        assert ask(server, "hi").status_code == 200
        assert check(server, "memory")["metadata"]["context_factor"] == 0.5


@pytest.fixture(scope="module")
def warned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """Only warned of memory, and in the default runtime mode."""
    log = tmp_path_factory.mktemp("warned") / "log"
    with serving(model, *SHORT_OF_MEMORY, "--memory-action", "warn", log=log) as server:
        yield server


def test_auto_widens_at_the_second_request_that_is_there(warned: ServerProcess) -> None:
    assert check(warned, "runtime_mode")["metadata"]["row_limit"] == 1
    assert ask_at_once(warned, 4) > 1
    state = check(warned, "runtime_mode")["metadata"]
    assert state["mode"] == "auto" and state["peak_concurrency"] >= 2 and state["times_widened"] == 1


def test_under_warn_only_the_idle_cache_goes(warned: ServerProcess) -> None:
    assert ask(warned, "word " * 200).status_code == 200
    wait_for(lambda: "idle prefix cache" in warned.output)

    def is_empty() -> bool:
        cache = httpx.get(f"{warned.url}/v1/cache/stats").json()
        return cache["prefix_cache_bytes"] == 0 and cache["num_evictions"] > 0

    wait_for(is_empty)  # a prefix that was stored just behind one reading goes at a later one
    assert ask(warned).status_code == 200


def ask_at_once(server: ServerProcess, count: int) -> int:
    """Most rows that were computed together; the answers are long enough to meet, however late the last one starts."""
    options = {"max_tokens": 250, "diagnostics_level": "deep", "repetition_policy_override": "off"}
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda i: ask(server, f"question {i}", **options).json(), range(count)))
    return max(answer["diagnostics"]["runtime"]["max_batch_rows"] for answer in answers)


def test_batched_computes_rows_together_and_replays_them_alone_and_they_agree(model: Path, tmp_path: Path) -> None:
    flags = ("--runtime-mode", "batched", "--batch-divergence-monitor", "--batch-divergence-interval", "0.1",
             "--memory-monitor-interval", "0.1")  # fmt: skip
    with serving(model, *flags, log=tmp_path / "log") as server:
        assert check(server, "batch_divergence")["metadata"]["sample_count"] == 0
        assert 2 <= ask_at_once(server, 4) <= 4
        state = check(server, "runtime_mode")["metadata"]
        assert state["mode"] == "batched" and state["peak_concurrency"] >= 2 and state["times_widened"] == 0
        wait_for(lambda: check(server, "batch_divergence")["metadata"]["sample_count"] > 0)
        assert check(server, "batch_divergence")["metadata"]["failed_probes"] == 0
        assert httpx.get(f"{server.url}/v1/status").json()["requests"] == []


def test_weights_above_the_limit_are_a_start_up_error_with_numbers(model: Path, tmp_path: Path) -> None:
    flags = ("--memory-warn-threshold", "0.00001", "--memory-limit-threshold", "0.0001")
    with serving(model, *flags, log=tmp_path / "log", is_awaited=False) as server:
        assert server.wait() == 1
        assert "--memory-limit-threshold" in server.output and "GiB" in server.output
        assert "Traceback" not in server.output
