"""`--batch-divergence-threshold` and `-action serialize` on a live server, whose model is made to answer otherwise in
company: what the monitor sees, what the threshold lets pass, one row at a time, and many again once answers agree."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.serving.process import ServerProcess, serving

FLAGS = (
    "--runtime-mode", "batched", "--speculation", "off", "--repetition-policy", "off",
    "--memory-monitor-interval", "0.1", "--batch-divergence-monitor", "--batch-divergence-interval", "0.02",
    "--batch-divergence-threshold", "0.5", "--batch-divergence-action", "serialize",
)  # fmt: skip
NUM_TOKENS = 60


def ask(server: ServerProcess, _: int = 0) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "Hi there"}], "temperature": 0, "max_tokens": NUM_TOKENS,
            "ignore_eos": True, "diagnostics_level": "deep"}  # fmt: skip
    return httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()


def together(server: ServerProcess, count: int) -> tuple[set[str], int]:
    """The answers of as many at once, and the most rows that were computed together."""
    with ThreadPoolExecutor(count) as pool:
        answers = list(pool.map(lambda i: ask(server, i), range(count)))
    rows = max(answer["diagnostics"]["runtime"]["max_batch_rows"] for answer in answers)
    return {answer["choices"][0]["message"]["content"] for answer in answers}, rows


def check(server: ServerProcess, name: str) -> dict[str, Any]:
    return httpx.get(f"{server.url}/health/diagnostics").json()["checks"][name]["metadata"]


def until(condition: Callable[[], Any], meanwhile: Callable[[], Any] = lambda: None) -> None:
    """A busy machine may compute one after the other what was asked at once, so it is asked again."""
    limit = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < limit, "it did not come"
        meanwhile()
        time.sleep(0.05)


def test_serialize_computes_one_row_from_a_divergence_on_until_answers_agree_again(tiny_model, tmp_path: Path) -> None:
    rules = tmp_path / "rules.json"
    options = {"entry": [str(Path(__file__).with_name("wobbly_server.py"))], "environment": {"WOBBLE": str(rules)}}
    with serving(tiny_model("qwen3"), *FLAGS, log=tmp_path / "log", **options) as server:

        def divergence() -> dict[str, Any]:
            return check(server, "batch_divergence")

        alone = ask(server)
        num_prompt, text = alone["usage"]["prompt_tokens"], alone["choices"][0]["message"]["content"]

        # Two rows differ late: the monitor sees it, and the threshold lets it pass.
        rules.write_text(json.dumps({"2": num_prompt + NUM_TOKENS - 10}))
        until(lambda: (divergence()["agreement"] or 1) < 1, lambda: together(server, 2))
        seen = divergence()
        assert seen["last_first_difference"] is None or seen["last_first_difference"] >= NUM_TOKENS - 10
        assert 0.5 < seen["agreement"] < 1 and not seen["serialize_active"]
        assert check(server, "runtime_mode")["row_limit"] > 1

        # Three differ from early on: under the threshold. From then on there is one row, and right answers.
        rules.write_text(json.dumps({"3": num_prompt + 1}))
        until(lambda: divergence()["serialize_active"], lambda: together(server, 3))
        assert "one row at a time until probes agree" in server.output
        for _ in range(2):
            assert together(server, 4) == ({text}, 1)
        assert check(server, "runtime_mode")["serialized"] and divergence()["serialize_active"]

        # The model is well again, the probes find out, and batches come back.
        rules.unlink()
        until(lambda: not divergence()["serialize_active"])
        assert "agree with lone ones again" in server.output
        rows = []
        until(lambda: max(rows, default=1) > 1, lambda: rows.append(together(server, 3)[1]))
        assert "Traceback" not in server.output, server.output
