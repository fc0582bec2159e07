"""One rank of several on this machine, without a server: `python -m tests.engine.rank_worker CASES RANK SIZE PORT`.

Computes one case after the other, each a model of its own; rank 0 prints what was answered, as JSON. MLX's ring is set
up by the environment, as `mlx.launch` does.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

from vllm_mlx import blas

blas.load()

from vllm_mlx.engine.assembly import EngineOptions, build_engine, build_runner  # noqa: E402
from vllm_mlx.engine.ranks import Follower, LeadBank, LeadRunner  # noqa: E402
from vllm_mlx.engine.request import Prompt, Request, SamplingParams  # noqa: E402
from vllm_mlx.engine.runner import ModelRunner  # noqa: E402
from vllm_mlx.engine.step import EngineStatus, TokenEvent  # noqa: E402
from vllm_mlx.models import sharding  # noqa: E402
from vllm_mlx.models.json_file import read_json  # noqa: E402
from vllm_mlx.models.loader import load, read_profile  # noqa: E402

KEY = b"of this test"
OPTIONS = EngineOptions(
    memory_bytes=256 << 20, prefix_cache_bytes=64 << 20, max_rows=8, prefill_step=32, seed=0,
    speculation="prompt-lookup", num_draft_tokens=6,
)  # fmt: skip


def load_part(case: dict[str, Any]) -> Any:
    folder = Path(case["folder"])
    split = sharding.splitter(case["kind"], read_profile(folder), read_json(folder / "config.json"))
    return load(folder, dtype="keep", split=split).model


def lead(case: dict[str, Any], connections: Sequence[Connection]) -> dict[str, Any]:
    """What rank 0 finds: the tokens of each request in order, and what the runner tells of itself at the end."""
    tokens: dict[str, list[int]] = defaultdict(list)

    def hear(events: Sequence[TokenEvent], status: EngineStatus) -> None:
        for event in events:
            tokens[event.request_id] += event.token_ids

    def send(messages: Any) -> None:
        for connection in connections:
            connection.send(messages)

    def led(runner: ModelRunner) -> LeadRunner:
        runner.guessing.bound(sharding.least(runner.guessing.most_draft))
        return LeadRunner(runner, send, sys.exit)

    model = load_part(case)
    engine = build_engine(model, OPTIONS, hear, lead=led)
    bank = LeadBank(model.adapters, engine.runner.say)  # type: ignore[attr-defined]  # a LeadRunner
    for name, folder in case["adapters"].items():
        bank.load(name, Path(folder))
    for turn in range(2):  # the second time with prefixes that are kept, and answers to guess from
        for number, asked in enumerate(case["requests"]):
            sampling = SamplingParams(temperature=asked.get("temperature", 0.0), seed=asked.get("seed"))
            adapter = asked.get("adapter", "")
            request = Request(f"{turn}-{number}", Prompt(tuple(asked["prompt"])), case["max_tokens"], sampling,
                              adapter=adapter, namespace=adapter)  # fmt: skip
            engine.submit(request)
            engine.step()
        while engine.has_work:
            engine.step()
    for name in case["adapters"]:
        bank.unload(name)
    send(None)
    answers = [[tokens[f"{turn}-{i}"] for i in range(len(case["requests"]))] for turn in range(2)]
    return {"answers": answers, "metrics": {k: v for k, v in engine.runner.metrics().items() if isinstance(v, int)}}


def follow(case: dict[str, Any], connection: Connection) -> None:
    model = load_part(case)
    runner = build_runner(model, OPTIONS, samples=False)
    sharding.least(runner.guessing.most_draft)
    follower = Follower(runner, model.adapters)
    while (messages := connection.recv()) is not None:
        follower.follow(messages)


def main(cases_file: str, rank: str, size: str, port: str) -> None:
    cases = json.loads(Path(cases_file).read_text())
    assert sharding.place() == (int(rank), int(size))
    if int(rank) == 0:
        with Listener(("127.0.0.1", int(port)), authkey=KEY) as listener:
            connections = [listener.accept() for _ in range(int(size) - 1)]
            print(json.dumps([lead(case, connections) for case in cases]))
        return
    while True:
        try:
            connection = Client(("127.0.0.1", int(port)), authkey=KEY)
            break
        except ConnectionRefusedError:
            time.sleep(0.05)
    for case in cases:
        follow(case, connection)


if __name__ == "__main__":
    main(*sys.argv[1:])
