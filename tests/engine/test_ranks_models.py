"""Two real processes over MLX's ring: greedy tokens equal mlx-lm's in one process; guesses, adapters and seeds, too."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from tests.engine.harness import EngineHarness, sampled
from tests.engine.test_oracle_adapters import KINDS, write_adapter
from tests.serving.process import free_port
from vllm_mlx.models.loader import load

NUM_TOKENS = 24
MODELS = {"llama": "tensor", "qwen3": "tensor", "qwen2": "pipeline", "deepseek_v3": "pipeline"}
ADAPTED = ("llama", "qwen2")


def greedy(folder: Path, prompt: list[int], adapter: Path | None = None) -> list[int]:
    model, _ = load_model(folder)
    if adapter is not None:
        load_adapters(model, str(adapter))
        model.eval()
    return [int(token) for token, _ in generate_step(mx.array(prompt), model, max_tokens=NUM_TOKENS)]


def run(cases: list[dict[str, Any]], folder: Path, size: int = 2) -> list[dict[str, Any]]:
    (folder / "cases.json").write_text(json.dumps(cases))
    (folder / "hosts.json").write_text(json.dumps([[f"127.0.0.1:{free_port()}"] for _ in range(size)]))
    port = str(free_port())
    processes = []
    for rank in range(size):
        arguments = [str(folder / "cases.json"), str(rank), str(size), port]
        command = [sys.executable, "-m", "tests.engine.rank_worker", *arguments]
        environment = {**os.environ, "MLX_HOSTFILE": str(folder / "hosts.json"), "MLX_RANK": str(rank)}
        stdout = subprocess.PIPE if rank == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, env=environment, stdout=stdout, text=True))
    try:
        output = processes[0].communicate(timeout=240)[0]
        assert [process.wait(timeout=60) for process in processes] == [0] * size
    finally:
        for process in processes:
            process.kill()
    return json.loads(output)


@pytest.fixture(scope="module")
def found(tiny_model, tmp_path_factory) -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Case and result by model; one pair of processes computes them all."""
    root = tmp_path_factory.mktemp("ranks")
    cases = []
    for name, kind in MODELS.items():
        folder, rng = tiny_model(name), random.Random(name)
        phrase = [rng.randrange(20, 590) for _ in range(6)]
        prompts = [phrase * 4, *([rng.randrange(20, 590) for _ in range(n)] for n in (3, 40))]
        adapters = {}
        if name in ADAPTED:
            kinds = enumerate(KINDS.items())
            adapters = {k: str(write_adapter(root / name / k, folder, seed=i, **v)) for i, (k, v) in kinds}
        requests = [{"prompt": prompt, "adapter": adapter} for prompt in prompts for adapter in ("", *adapters)]
        requests.append({"prompt": prompts[1], "temperature": 1.0, "seed": 5})
        cases.append(
            {"folder": str(folder), "kind": kind, "adapters": adapters, "requests": requests, "max_tokens": NUM_TOKENS}
        )
    return {name: pair for name, *pair in zip(MODELS, cases, run(cases, root), strict=True)}


@pytest.mark.parametrize("name", MODELS)
def test_both_ranks_together_answer_as_one_process(found, name: str) -> None:
    case, result = found[name]
    folder = Path(case["folder"])
    *requests, seeded = case["requests"]
    wanted = [
        greedy(folder, r["prompt"], Path(case["adapters"][r["adapter"]]) if r["adapter"] else None) for r in requests
    ]
    for answers in result["answers"]:
        assert answers[:-1] == wanted
    harness = EngineHarness(load(folder, dtype="keep").model)
    alone = harness.lone(seeded["prompt"], max_tokens=NUM_TOKENS, sampling=sampled(temperature=1.0, seed=5))
    assert [answers[-1] for answers in result["answers"]] == [alone, alone], "seeds hold"


def test_guesses_are_made_and_kept_on_all_ranks(found) -> None:
    """Over all models: whether guessing pays is measured for each, and a busy machine may say that it does not."""
    metrics = [result["metrics"] for _, result in found.values()]
    assert sum(m["num_draft_tokens"] for m in metrics) > 0 and sum(m["num_accepted_tokens"] for m in metrics) > 0
