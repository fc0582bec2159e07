"""What a row that joins or leaves costs the others, in steps: `python -m vllm_mlx.bench.churn MODEL [ROWS] [PROMPT]`.

The engine alone, many rows decoding. A prompt is computed, and its row joins; later another row leaves; and so on. The
cost is the time of the next steps beyond the steps after those, which have the same rows: copying keys and values,
building buffers, first uses of a shape. Computing the prompt itself is not counted, nor is that a row may stand in a
group of its own for a while. Of each of the next steps the median over all events counts, so that a hiccup of the
machine does not. Prints JSON; a process of its own.
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

NUM_EVENTS = 40
# What an event costs is paid within a few steps.
AFTER, SETTLED = 6, 6


async def measure_churn(model: str) -> dict[str, float]:
    """Shares of a step that a `join` and a `leave` cost, in a child process."""
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
        """Seconds of processor time (neighbours on the machine do not count) of each of the next steps.

        Each step's work is waited for, so that it counts for the step that launched it: a prompt's last chunk is still
        being computed when its row joins.
        """
        from vllm_mlx.models import device  # imports MLX

        device.finish()
        times = []
        for _ in range(count):
            started = time.process_time()
            self._engine.step()
            device.finish()
            times.append(time.process_time() - started)
        return times


def excess(events: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """What an event costs, as a share of a step. Each event: times of the steps after it, and of settled ones."""
    shares = [[t / statistics.median(settled) - 1 for t in after] for after, settled in events]
    return sum(statistics.median(place) for place in zip(*shares, strict=True))


def main(folder: str, num_rows: int = 16, num_prompt: int = 64) -> None:
    blas.load()
    crowd = Crowd(folder, num_prompt)
    for _ in range(num_rows):
        crowd.grow()
    crowd.steps(AFTER + SETTLED)
    events: dict[str, list[tuple[list[float], list[float]]]] = {"join": [], "leave": []}
    for _ in range(NUM_EVENTS):
        for name, happen in (("join", crowd.grow), ("leave", crowd.shrink)):
            happen()
            events[name].append((crowd.steps(AFTER), crowd.steps(SETTLED)))
    print(json.dumps({name: excess(found) for name, found in events.items()}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
