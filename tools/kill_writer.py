"""kill -9 while the disk cache is being written, again and again: every restart is clean, and its hits are right.

    python -m tools.kill_writer --rounds 50

Each round starts a server on the same folder, checks that a prompt which the round before saw on disk is answered from
there with the same text, asks new ones from several clients, and kills the process at a random moment. Between rounds
every file is read and checked.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tools.canary import Turn, ask
from vllm_mlx.bench import servers
from vllm_mlx.bench.agent_models import KINDS, build_kind
from vllm_mlx.bench.client import Endpoint
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.workloads import Writer
from vllm_mlx.engine.disk_folder import BlockFolder

FLAGS = ["--runtime-mode", "batched", "--disk-cache-min-tokens", "64", "--disk-cache-gb", "1"]


def turn(seed: int) -> Turn:
    return Turn(({"role": "user", "content": Writer(seed).text(700)},), 12)


def whole_blocks(disk: Path, problems: list[str]) -> int:
    """Blocks in the folder; each damaged one is a problem."""
    folder = BlockFolder(disk, limit_bytes=1 << 40)
    folder.open("")
    problems += [f"damaged: {reason}" for _, reason in folder.damaged()]
    count = folder.num_blocks
    folder.close()
    return count


async def round_(
    model: str, disk: Path, number: int, known: dict[int, str], counts: Counter[str], problems: list[str]
) -> None:
    rng, port = random.Random(number), servers.free_port()
    command = servers.ours(model, port, [*FLAGS, "--disk-cache", str(disk)])
    async with servers.running(command, port, "default") as (endpoint, pid):
        for seed in rng.sample(sorted(known), min(3, len(known))):
            text, num_cached = await ask(endpoint, turn(seed))
            counts["asked again"] += 1
            counts["answered from disk"] += num_cached > 500
            if text != known[seed]:
                problems.append(f"round {number}: prompt {seed} says {text!r}, said {known[seed]!r}")
        clients = [asyncio.create_task(_client(endpoint, 10_000 * number + 100 * c, known)) for c in range(3)]
        num_before, until = len(known), time.monotonic() + 120
        while len(known) < num_before + 3 and time.monotonic() < until:
            await asyncio.sleep(0.05)  # on a busy machine nothing would be written before the end
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        os.kill(pid, signal.SIGKILL)
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
    counts["killed"] += 1


async def _client(endpoint: Endpoint, first_seed: int, known: dict[int, str]) -> None:
    """New prompts without end; each answer is remembered."""
    with contextlib.suppress(RuntimeError):  # the server was killed
        for seed in range(first_seed, first_seed + 100):
            known[seed], _ = await ask(endpoint, turn(seed))


async def run(*, rounds: int, kind: str, folder: Path | None = None) -> tuple[Counter[str], list[str]]:
    model = str(build_kind(folder or default_folder(), kind))
    counts: Counter[str] = Counter()
    problems: list[str] = []
    known: dict[int, str] = {}
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="vllm-mlx-kill-") as disk:
        for number in range(rounds):
            await round_(model, Path(disk), number, known, counts, problems)
            before, counts["blocks"] = counts["blocks"], whole_blocks(Path(disk), problems)
            if not counts["blocks"]:
                problems.append(f"round {number}: nothing was written, so nothing was tried")
            if counts["blocks"] < before:
                problems.append(f"round {number}: {before} blocks became {counts['blocks']}")
    counts["seconds"] = int(time.monotonic() - started)
    return counts, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--kind", choices=KINDS, default="hybrid")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    counts, problems = asyncio.run(run(rounds=options.rounds, kind=options.kind, folder=options.folder))
    for name, count in counts.items():
        print(f"{count:>8} {name}")
    for problem in problems[:20]:
        print(f"PROBLEM: {problem}")
    print("every restart was clean" if not problems else f"{len(problems)} problems")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
