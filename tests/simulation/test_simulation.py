"""Thousands of seeds of random traffic. A failing seed is repeated with `python -m tests.simulation SEED`."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor

from tests.simulation.simulation import Simulation

NUM_SEEDS = int(os.environ.get("VLLM_MLX_SIM_SEEDS", "10000"))


def failures(first: int, last: int) -> list[str]:
    """One line for each seed in [first, last) that does not hold."""
    found = []
    for seed in range(first, last):
        try:
            Simulation(seed).run()
        except Exception as error:  # every kind of failure is a finding
            found.append(f"python -m tests.simulation {seed}   # {type(error).__name__}: {error}")
    return found


def test_random_traffic_gives_every_request_its_lone_answer() -> None:
    step = 250
    ranges = [(first, min(first + step, NUM_SEEDS)) for first in range(0, NUM_SEEDS, step)]
    with ProcessPoolExecutor() as pool:
        found = [line for lines in pool.map(failures, *zip(*ranges, strict=True)) for line in lines]
    assert not found, f"{len(found)} of {NUM_SEEDS} seeds failed:\n" + "\n".join(found[:20])
