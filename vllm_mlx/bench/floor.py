"""What this machine can do at most, measured: `python -m vllm_mlx.bench.floor` prints it as JSON.

A process of its own, because the benchmark does not load MLX. The least time of a decode step follows: every weight is
read once, and multiplied once for each row.
"""

from __future__ import annotations

import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from vllm_mlx import blas
from vllm_mlx.errors import VllmMlxError
from vllm_mlx.models.profile import read_profile


@dataclass(frozen=True, slots=True)
class Floor:
    """Rates of the machine as MLX sees it, and what a model moves: `bytes_per_s` as a step reads weights,
    `flop_per_s` of a square product, bytes and number of the model's weights."""

    bytes_per_s: float
    flop_per_s: float
    weights_bytes: int
    num_weights: int

    def step_ms(self, num_rows: int) -> float:
        """Least milliseconds of a step that gives each row a token; keys and values are not counted."""
        reading = self.weights_bytes / self.bytes_per_s
        return 1e3 * max(reading, 2 * self.num_weights * num_rows / self.flop_per_s)

    def __str__(self) -> str:
        return (
            f"this machine moves {self.bytes_per_s / 1e9:.1f} GB/s and multiplies {self.flop_per_s / 1e9:.0f} GFLOP/s;"
            f" a step reads {self.weights_bytes / 1e6:.0f} MB of weights, {self.step_ms(1):.2f} ms at least"
        )


async def measure_floor(folder: Path) -> Floor:
    """The machine's rates, measured now, for the model in `folder`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "vllm_mlx.bench.floor", stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate()
    if process.returncode:
        raise VllmMlxError(f"The machine's rates could not be measured (code {process.returncode}); see above.")
    profile = read_profile(folder)
    return Floor(**json.loads(output), weights_bytes=profile.weights_bytes, num_weights=profile.num_parameters)


def main() -> None:
    blas.load()
    from vllm_mlx.models.rates import measure_rates  # imports MLX

    print(json.dumps(measure_rates()))


def as_dict(floor: Floor | None) -> dict[str, float] | None:
    return asdict(floor) if floor is not None else None


if __name__ == "__main__":
    main()
