"""Some hundred seeds of random traffic (`make sim`: ten thousand). To repeat one: `python -m tests.simulation SEED`."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.simulation import Simulation

NUM_SEEDS = int(os.environ.get("VLLM_MLX_SIM_SEEDS", "600"))


def failures(first: int, last: int) -> list[str]:
    """One line for each seed in [first, last) that does not hold."""
    found = []
    for seed in range(first, last):
        try:
            Simulation(seed).run()
        except Exception as error:  # every kind of failure is a finding
            found.append(f"python -m tests.simulation {seed}   # {type(error).__name__}: {error}")
    return found


def failures_of_range(num_seeds: int) -> list[str]:
    """All of [0, num_seeds), on every core."""
    step = 100
    ranges = [(first, min(first + step, num_seeds)) for first in range(0, num_seeds, step)]
    with ProcessPoolExecutor() as pool:
        return [line for lines in pool.map(failures, *zip(*ranges, strict=True)) for line in lines]


def test_random_traffic_gives_every_request_its_lone_answer() -> None:
    found = failures_of_range(NUM_SEEDS)
    assert not found, f"{len(found)} of {NUM_SEEDS} seeds failed:\n" + "\n".join(found[:20])
