"""What a row that joins or leaves costs the others, in steps: `python -m vllm_mlx.bench.churn MODEL [ROWS] [PROMPT]`.

The engine alone, many rows decoding. A prompt is computed, and its row joins; later another row leaves. The cost is the
time of the steps after that beyond as many steps of the same number of rows once all has settled: copies, rows in
groups of their own, all of it. Computing the prompt itself is not counted. Prints JSON; a process of its own.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence

from vllm_mlx import blas
from vllm_mlx.errors import VllmMlxError

NUM_EVENTS = 11
# Groups are merged within a few steps; after that nothing is left to pay.
AFTER, SETTLED = 12, 12


async def measure_churn(model: str) -> dict[str, list[float]]:
    """Shares of a step that each `join` and each `leave` cost, in a child process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_mlx.bench.churn", model, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise VllmMlxError(f"Joining and leaving could not be measured (code {process.returncode}); see above.")
    return dict(json.loads(output))


class Crowd:
    """An engine whose rows never end by themselves."""

    def __init__(self, folder: str, num_prompt: int) -> None:
        from vllm_mlx.engine.assembly import EngineOptions, build_engine  # after the BLAS: these import MLX
        from vllm_mlx.models import loader

        loaded = loader.load(folder)
        options = EngineOptions(memory_bytes=4 << 30, prefix_cache_bytes=0)
        self._rng = random.Random(1)
        self._vocab = loaded.model.profile.vocab_size
        self._num_prompt = num_prompt
        self._count = 0
        self._engine = build_engine(loaded.model, options, lambda events, status: None)

    def grow(self) -> None:
        """One more row; returns when its prompt is computed and it is about to join."""
        from vllm_mlx.engine.request import Prompt, Request

        self._count += 1
        prompt = tuple(self._rng.randrange(20, self._vocab - 20) for _ in range(self._num_prompt))
        self._engine.submit(Request(f"r{self._count}", Prompt(prompt), 100_000))
        while self._engine.scheduler.waiting or any(s.is_prefilling for s in self._engine.scheduler.running.values()):
            self._engine.step()

    def shrink(self) -> None:
        """The row that has been there longest leaves at the next step."""
        self._engine.cancel(next(iter(self._engine.scheduler.running)))

    def steps(self, count: int) -> list[float]:
        """Seconds of processor time (neighbours on the machine do not count) of each of the next steps."""
        times = []
        for _ in range(count):
            started = time.process_time()
            self._engine.step()
            times.append(time.process_time() - started)
        return times


def excess(after: Sequence[float], settled: Sequence[float]) -> float:
    """Time of the steps after an event beyond as many settled ones, as a share of one of these."""
    step = statistics.median(settled)
    return (sum(after) - len(after) * step) / step


def main(folder: str, num_rows: int = 16, num_prompt: int = 64) -> None:
    blas.load()
    crowd = Crowd(folder, num_prompt)
    for _ in range(num_rows):
        crowd.grow()
    crowd.steps(AFTER + SETTLED)
    costs: dict[str, list[float]] = {"join": [], "leave": []}
    for _ in range(NUM_EVENTS):
        for name, happen in (("join", crowd.grow), ("leave", crowd.shrink)):
            happen()
            costs[name].append(excess(crowd.steps(AFTER), crowd.steps(SETTLED)))
    print(json.dumps(costs))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
