"""Prompt tokens computed in a 30-turn, 20,000-token session, counted in the engine itself, on every kind of cache.

    python -m tools.agent_counts

What `vllm-mlx bench --agent` measures over HTTP, without servers, text and clocks: on the tests' tiny models it takes a
minute or two on a quiet machine, and counts do not depend on a model's size. Each session runs twice: in memory, and
with everything but the disk cache's folder thrown away half way.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests import tiny_models
from tests.engine.harness import EngineHarness
from vllm_mlx.models.loader import load

KINDS = {
    "attention": "qwen3", "sliding window": "gemma3_text", "hybrid": "qwen3_next", "MLA": "deepseek_v3",
    "recurrent": "mamba2",
}  # fmt: skip
NUM_TURNS, SYSTEM, PER_TURN, ANSWER = 30, 2000, 568, 32


def session(model: Any, disk: Path | None) -> tuple[int, int]:
    """Tokens computed and unavoidable. With a folder, the engine is a new one from the middle on."""

    def start() -> EngineHarness:
        return EngineHarness(model, chunk=256, checkpoint_interval=2048, disk=disk)

    rng = random.Random(1)
    harness, computed, unavoidable = start(), 0, SYSTEM
    conversation = [rng.randrange(20, 590) for _ in range(SYSTEM)]
    for turn in range(NUM_TURNS):
        if disk is not None and turn == NUM_TURNS // 2:
            harness.stop()
            computed += harness.scheduler.counters.num_prefilled_tokens
            harness = start()
        conversation += [rng.randrange(20, 590) for _ in range(PER_TURN)]
        boundary = len(conversation) - PER_TURN
        answer = harness.lone(conversation, max_tokens=ANSWER, boundaries=(SYSTEM, boundary), ignore_eos=True)
        # The answer's last token was given out, but nobody computed it yet; the prompt's last is left to decoding.
        unavoidable += PER_TURN - 1 + (1 if turn else 0)
        conversation += answer
    computed += harness.scheduler.counters.num_prefilled_tokens
    if disk is not None:
        harness.stop()
    return computed, unavoidable


def main() -> int:
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="vllm-mlx-counts-") as scratch:
        for kind, name in KINDS.items():
            model = load(tiny_models.build(name, Path(scratch) / name)).model
            for where, disk in (("in memory", None), ("restarted half way", Path(scratch) / f"{name}-disk")):
                computed, unavoidable = session(model, disk)
                worst = max(worst, computed / unavoidable)
                ratio = f"{computed / unavoidable:.4f}  ({computed} of {unavoidable})"
                print(f"{kind:>15}, {where:<19} {ratio}", flush=True)
    return 0 if worst <= 1.02 else 1


if __name__ == "__main__":
    sys.exit(main())
