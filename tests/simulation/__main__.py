"""`python -m tests.simulation [SEED ...]`: run single seeds with a full traceback, or the whole range without one."""

import logging
import sys

from tests.simulation.simulation import Simulation
from tests.simulation.test_simulation import failures_of_range

NUM_SEEDS = 10_000

logging.disable(logging.CRITICAL)
if len(sys.argv) > 1:
    for seed in map(int, sys.argv[1:]):
        Simulation(seed).run()
        print(f"seed {seed} holds")
else:
    found = failures_of_range(NUM_SEEDS)
    print("\n".join(found) or f"{NUM_SEEDS} seeds hold")
    sys.exit(bool(found))
