"""What the host is promised to cost, each with a verdict: `python -m tools.measure_host [sampling] [step] [start]`.

    sampling   16 rows of a vocabulary of 151,936: greedy, and top-p exact over the whole vocabulary
    step       scheduler and sampling of a step of 256 rows of a model so small that nothing else counts
    start      the demo model from nothing to its first answer, the second time; and what a server that has worked keeps
               in memory beside weights, keys and values

Medians, in this process (sampling, step) or of servers that are started and ended here. Ends with code 1 when a promise
is missed. Times are by the clock: run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_mlx import blas

blas.load()  # before MLX

import httpx  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from rich.console import Console  # noqa: E402

from tools.measure_gpu import measure_host  # noqa: E402
from tools.measure_sampling import CASES, ROUNDS  # noqa: E402
from vllm_mlx.bench import servers, workloads  # noqa: E402
from vllm_mlx.bench.client import Endpoint  # noqa: E402
from vllm_mlx.bench.main import EXTRA, default_folder  # noqa: E402
from vllm_mlx.bench.model import build  # noqa: E402
from vllm_mlx.bench.report import Number, Report  # noqa: E402
from vllm_mlx.bench.targets import HttpTarget  # noqa: E402
from vllm_mlx.engine.sampler import BatchSampler, SamplingRow  # noqa: E402

NUM_ROWS, VOCAB = 16, 151_936
NUM_STARTS = 3


def sampling() -> list[Number]:
    """Milliseconds of one step's sampling, random logits spread like a model's."""
    logits = mx.array((np.random.default_rng(0).standard_normal((NUM_ROWS, VOCAB)) * 2.5).astype(np.float32))
    mx.eval(logits)
    found = []
    for name, limit in (("greedy", 3.0), ("top_p 0.95", 30.0)):
        rows = [SamplingRow(CASES[name], vocab_size=VOCAB, seed=i) for i in range(NUM_ROWS)]
        sampler = BatchSampler()
        times = []
        for _ in range(ROUNDS + 2):
            started = time.perf_counter()
            mx.eval(sampler.sample(logits, rows).arrays())
            times.append(1e3 * (time.perf_counter() - started))
        found.append(_median(f"sampling 16 rows of 151,936, {name}", times[2:], limit, " ms"))
    return found


def step() -> list[Number]:
    """Milliseconds of a step that the host spends; publishing, which hands the tokens over, is not promised."""
    runs = [measure_host() for _ in range(3)]
    found = []
    for kind in ("greedy", "top_p"):
        own = [sum(run[f"{kind}: {part}"] for part in ("plan", "sample", "commit")) for run in runs]
        found.append(_median(f"256 rows, {kind}: scheduler and sampling", own, 2.0, " ms"))
        all_parts = [run[f"{kind}: together"] for run in runs]
        found.append(_median(f"256 rows, {kind}: with publishing", all_parts, None, " ms"))
    return found


def start() -> list[Number]:
    return asyncio.run(_start())


async def _start() -> list[Number]:
    seconds = []
    for _ in range(1 + NUM_STARTS):  # the first finds nothing in the file cache
        port = servers.free_port()
        started = time.perf_counter()
        async with servers.running(servers.ours("demo", port), port, "default"):
            seconds.append(time.perf_counter() - started)
    model = build(default_folder(), "30m")
    over = [await _memory_over(model) for _ in range(2)]
    return [
        _median("demo model, from nothing to the first answer, warm", seconds[1:], 6.0, " s"),
        _median("memory beside weights, keys and values, after work", over, 400.0, " MB"),
    ]


async def _memory_over(model: Path) -> float:
    """Resident MB of a server after 16 streams and two long prompts, less weights and all keys and values kept."""
    port = servers.free_port()
    async with servers.running(servers.ours(str(model), port), port, "default") as (endpoint, pid):
        target = HttpTarget("server", endpoint, EXTRA, pid)
        for name, count in (("short", 16), ("long", 2)):
            await target.run(workloads.make(name, count, seed=3, max_tokens=32), count)
        status = await _status(endpoint)
        kept = status["kv_bytes"] + status["prefix_cache_bytes"] + (model / "model.safetensors").stat().st_size
        return (_resident_bytes(pid) - kept) / 1e6


async def _status(endpoint: Endpoint) -> dict[str, int]:
    async with httpx.AsyncClient(timeout=60) as client:
        return dict((await client.get(endpoint.url.removesuffix("/v1") + "/v1/cache/stats")).json())


def _resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/status names no VmRSS")


def _median(name: str, values: Sequence[float], limit: float | None, unit: str) -> Number:
    return Number(name, statistics.median(values), limit, at_least=False, unit=unit, rounds=tuple(values))


PARTS: dict[str, Callable[[], list[Number]]] = {"sampling": sampling, "step": step, "start": start}


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools.measure_host", description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; all without any")
    chosen = parser.parse_args(list(argv)).parts or list(PARTS)
    if unknown := [part for part in chosen if part not in PARTS]:
        parser.error(f"there is no part {unknown[0]!r}; choose of {', '.join(PARTS)}")
    report = Report(numbers=[number for part in chosen for number in PARTS[part]()])
    report.show(Console(width=None if sys.stdout.isatty() else 150))
    return 0 if all(number.is_met for number in report.numbers) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
