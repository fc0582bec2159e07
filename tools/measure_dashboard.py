"""What an open dashboard costs the engine: `python -m tools.measure_dashboard [--rounds 24] [--clients 4]`.

A server with the built-in model answers the same requests again and again, with 0, 1 and 64 dashboards open in turns
(which is first changes with the round). For each number of dashboards: the tokens a second and the server's processor
time for them, as medians over the rounds of the ratio to the same round without. One dashboard's share is smaller than
what a busy machine does to one round; 64 make it visible, and a 64th of their cost is another measure of one. Then
the same server without requests: the processor time that a dashboard takes of each second. A dashboard here is what the
page is to the server: a reader of `/v1/dashboard`. It ends with code 1 when one costs more than 1 %.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import httpx

from tests.serving.process import ServerProcess, serving
from vllm_mlx.bench.targets import cpu_seconds

LIMIT = 0.01
MANY = 64
IDLE_S = 6.0
PROMPTS = [f"Write a short story about a {thing}" for thing in ("lighthouse", "fox", "clock", "river", "ship", "tree")]


@dataclass(frozen=True)
class Round:
    tokens_per_s: float
    cpu_s: float
    wall_s: float


class Dashboards:
    """So many readers of the stream, each of which has been told hello."""

    def __init__(self, client: httpx.AsyncClient, number: int) -> None:
        self._client, self._number = client, number
        self._tasks: list[asyncio.Task[None]] = []
        self.num_events = 0

    async def __aenter__(self) -> Dashboards:
        greeted = [asyncio.Event() for _ in range(self._number)]
        self._tasks = [asyncio.create_task(self._read(event)) for event in greeted]
        for event in greeted:
            await event.wait()
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _read(self, greeted: asyncio.Event) -> None:
        async with self._client.stream("GET", "/v1/dashboard") as response:
            async for line in response.aiter_lines():
                self.num_events += line.startswith("event:")
                greeted.set()


async def measure(server: ServerProcess, num_rounds: int, num_clients: int, num_tokens: int) -> dict[str, object]:
    limits = httpx.Limits(max_connections=MANY + num_clients + 2)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

        async def answer(prompt: str) -> int:
            body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": num_tokens, "ignore_eos": True}
            response = await client.post("/v1/chat/completions", json=body)
            return int(response.raise_for_status().json()["usage"]["completion_tokens"])

        async def one_round(num_dashboards: int) -> Round:
            async with AsyncExitStack() as stack:
                await stack.enter_async_context(Dashboards(client, num_dashboards))
                cpu, start = cpu_seconds(server.process.pid), time.perf_counter()
                counts = await asyncio.gather(*(answer(PROMPTS[i % len(PROMPTS)]) for i in range(num_clients)))
                wall = time.perf_counter() - start
                after = cpu_seconds(server.process.pid)
            assert cpu is not None and after is not None, "processor time of another process is read from /proc"
            return Round(sum(counts) / wall, after - cpu, wall)

        rounds: dict[int, list[Round]] = defaultdict(list)
        turns = [0, 1, MANY]
        for number in turns:  # warm
            await one_round(number)
        for number in range(num_rounds):
            for num_dashboards in turns[number % 3 :] + turns[: number % 3]:
                rounds[num_dashboards].append(await one_round(num_dashboards))
        idle: dict[int, list[float]] = defaultdict(list)
        for _ in range(3):
            for num_dashboards in (0, MANY):
                async with Dashboards(client, num_dashboards):
                    before = cpu_seconds(server.process.pid) or 0.0
                    await asyncio.sleep(IDLE_S)
                    idle[num_dashboards].append(((cpu_seconds(server.process.pid) or 0.0) - before) / IDLE_S)
    each_s = (statistics.median(idle[MANY]) - statistics.median(idle[0])) / MANY
    return {**summary(rounds), "ms_of_each_idle_second": round(1000 * each_s, 2)}


def summary(rounds: dict[int, list[Round]]) -> dict[str, object]:
    none = rounds[0]
    speed = statistics.median(r.tokens_per_s for r in none)
    result: dict[str, object] = {"rounds": len(none), "tokens_per_s": round(speed, 1)}
    costs = {}
    for number in (1, MANY):
        pairs = list(zip(rounds[number], none, strict=True))
        lost = [1 - some.tokens_per_s / without.tokens_per_s for some, without in pairs]
        more = [some.cpu_s / without.cpu_s - 1 for some, without in pairs]
        costs[number] = statistics.median(more)
        result[f"{number}_open"] = {"throughput_lost": spread(lost), "processor_time_more": spread(more)}
    result["one_of_many"] = percent(costs[MANY] / MANY)
    result["is_cheap"] = costs[MANY] / MANY <= LIMIT
    return result


def spread(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{percent(middle)} (half of the rounds: {percent(low)} to {percent(high)})"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=192, help="of each answer")
    arguments = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as folder,
        serving("demo", "--log-level", "warning", log=Path(folder) / "log") as server,
    ):
        result = asyncio.run(measure(server, arguments.rounds, arguments.clients, arguments.tokens))
    print(json.dumps(result, indent=1))
    return 0 if result["is_cheap"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
