"""Many streams, random disconnects, for minutes; then everything must be back where it was.

    python -m tools.soak --minutes 5
    python -m tools.soak --url http://127.0.0.1:8000/v1 --minutes 1      a server that runs already (log not read)

Starts a server on the benchmark's model, keeps `--streams` requests alive on it (streamed and whole, short and long
prompts, many choices, stop strings, sampling), leaves a third of them at a random moment, and at the end asks the
server what it still holds: rows, waiting requests, KV bytes, permits, live requests must be zero, the emptied prefix
cache must be empty (a lease that nobody gave back would keep its part), memory must be near where it began, and the log
must hold no error.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_mlx.bench import servers
from vllm_mlx.bench.client import Endpoint, send
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.model import build
from vllm_mlx.bench.workloads import Writer

LEAVE_SHARE = 0.33
MEMORY_SLACK_BYTES = 64 << 20
QUIET_TIMEOUT_S = 30.0


@dataclass
class Soak:
    """One run against one server. `problems` are sentences; empty means that all held.

    `enough`: counts at which the streams end before their time.
    """

    endpoint: Endpoint
    num_streams: int
    seconds: float
    seed: int = 1
    log: Path | None = None
    enough: Mapping[str, int] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    async def run(self) -> None:
        self._prompts = self._make_prompts()
        await self._warm_up()
        before = await self._settled()
        until = time.monotonic() + self.seconds
        await asyncio.gather(*(self._stream(number, until) for number in range(self.num_streams)))
        after = await self._settled()
        self._compare(before, after)
        self._read_log()

    # ── traffic ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _make_prompts(self) -> list[str]:
        """A few prompts that share beginnings, and some long ones, so that the prefix cache has work."""
        writer = Writer(self.seed)
        stem = writer.text(300)
        short = [writer.text(20) for _ in range(8)]
        return [*short, *(f"{stem} {writer.text(20)}" for _ in range(8)), writer.text(900), writer.text(1500)]

    async def _warm_up(self) -> None:
        """Touch every prompt once: caches of the process (tokenizer, compiled code, pools) are not leaks."""
        rng = random.Random(0)
        await asyncio.gather(*(self._ask(self._body(rng, prompt), None) for prompt in self._prompts))

    async def _stream(self, number: int, until: float) -> None:
        rng = random.Random(self.seed * 1000 + number)
        while time.monotonic() < until and not self._has_enough:
            leave_after_s = rng.expovariate(1.5) if rng.random() < LEAVE_SHARE else None
            await self._ask(self._body(rng, rng.choice(self._prompts)), leave_after_s)

    @property
    def _has_enough(self) -> bool:
        return bool(self.enough) and all(self.counts[name] >= count for name, count in self.enough.items())

    def _body(self, rng: random.Random, prompt: str) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "max_tokens": rng.choice([1, 4, 16, 16, 64, 150]),
            "stream": rng.random() < 0.8,
            "repetition_policy_override": rng.choice(["safe", "off"]),
        }
        if rng.random() < 0.5:
            body.update(temperature=0)
        else:
            body.update(temperature=0.8, top_p=0.9, seed=rng.randrange(1000))
        if rng.random() < 0.1:
            body["n"] = rng.choice([2, 3])
        if rng.random() < 0.1:
            body["stop"] = [rng.choice("aeiou") + " "]
        if rng.random() < 0.1:
            body.update(presence_penalty=0.5, frequency_penalty=0.5)
        if rng.random() < 0.1:
            body["timeout"] = rng.choice([0.2, 1, 5])
        if rng.random() < 0.2:
            return "/completions", {**body, "prompt": prompt}
        if rng.random() < 0.1:
            body.update(logprobs=True, top_logprobs=2)
        return "/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}

    async def _ask(self, request: tuple[str, dict[str, Any]], leave_after_s: float | None) -> None:
        path, body = request
        try:
            transport, receiver = await send(self.endpoint, path, json.dumps(body).encode())
        except OSError as error:
            self._problem(f"no connection: {error}")
            await asyncio.sleep(0.2)
            return
        try:
            await asyncio.wait_for(asyncio.shield(receiver.closed), leave_after_s or 300)
            self._judge(body, b"".join(piece for _, piece in receiver.pieces))
        except TimeoutError:
            self.counts["left" if leave_after_s is not None else "hung"] += 1
            if leave_after_s is None:
                self._problem(f"no end after 300 s: {body}")
            transport.abort()
        except OSError as error:
            self._problem(f"the server broke the connection: {error}")
        finally:
            transport.close()

    def _judge(self, body: dict[str, Any], answer: bytes) -> None:
        """A whole answer, or a refusal or time-out that was asked for."""
        status = answer[9:12].decode(errors="replace")
        is_timed = "timeout" in body
        if status == "200" and (not body["stream"] or b"data: [DONE]" in answer):
            has_error = b'"error":' in answer and body["stream"]
            if has_error and not is_timed:
                self._problem(f"an error in a stream: {answer[-300:]!r}")
            self.counts["timed out" if has_error else "answered"] += 1
        elif status in ("429", "503"):
            self.counts["refused"] += 1
        elif status == "504" and is_timed:
            self.counts["timed out"] += 1
        else:
            self._problem(f"status {status or 'missing'} for {body}: {answer[-300:]!r}")

    # ── what must hold at the end ───────────────────────────────────────────────────────────────────────────────

    async def _settled(self) -> dict[str, Any]:
        """The server's state once nothing runs any more and its prefix cache is emptied."""
        root = self.endpoint.url.removesuffix("/v1")
        async with httpx.AsyncClient(base_url=root, timeout=60) as client:
            until = time.monotonic() + QUIET_TIMEOUT_S
            while time.monotonic() < until:
                state = (await client.get("/v1/status")).json()
                if not (state["num_running"] or state["num_waiting"] or state["runtime"]["active_concurrency"]):
                    break
                await asyncio.sleep(0.1)
            (await client.delete("/v1/cache")).raise_for_status()
            # Its own diagnostics tell the permits and the rows' bytes: one permit is this request's.
            answer = await client.post("/v1/chat/completions", json={
                "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "diagnostics_level": "deep",
            })  # fmt: skip
            answer.raise_for_status()
            (await client.delete("/v1/cache")).raise_for_status()
            return {
                "status": (await client.get("/v1/status")).json(),
                "deep": answer.json()["diagnostics"],
                "health": (await client.get("/health")).json(),
            }

    def _compare(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        status, cache = after["status"], after["status"]["cache"]
        found = {
            "requests running in the engine": status["num_running"],
            "requests waiting in the engine": status["num_waiting"],
            "rows in the batch": status["batch_rows"],
            "requests live in HTTP": status["runtime"]["active_concurrency"],
            "bytes of KV reserved": cache["kv_bytes"],
            "bytes in the emptied prefix cache (a lease holds them)": cache["prefix_cache_bytes"],
            "permits held beside the asking request's own": after["deep"]["runtime"]["permits_held"] - 1,
        }
        self.problems += [f"{value} {name} at the end" for name, value in found.items() if value]
        if after["health"]["status"] != "healthy":
            self.problems.append(f"health is {after['health']}")
        grown = _active_bytes(after) - _active_bytes(before)
        if grown > MEMORY_SLACK_BYTES:
            self.problems.append(f"MLX holds {grown / 2**20:.0f} MiB more than before")
        self.counts["MiB of MLX memory more than before"] = int(grown / 2**20)
        held = [s["status"]["memory"].get("process_bytes") or 0 for s in (before, after)]
        self.counts["MiB of process memory more than before"] = int((held[1] - held[0]) / 2**20)
        self.counts["completion tokens"] = status["total_completion_tokens"]
        self.counts["preemptions"] = status["num_preemptions"]

    def _read_log(self) -> None:
        if self.log is None:
            return
        for line in self.log.read_text(errors="replace").splitlines():
            if " ERROR " in line or " CRITICAL " in line or "Traceback" in line or "Exception" in line:
                self._problem(f"the log says: {line}")

    def _problem(self, sentence: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(sentence)


def _active_bytes(state: dict[str, Any]) -> float:
    return float(state["status"]["memory"]["active_gb"]) * 2**30


async def soak(
    *, minutes: float, num_streams: int = 64, url: str | None = None, size: str = "30m", seed: int = 1,
    folder: Path | None = None, server_flags: Sequence[str] = (), enough: Mapping[str, int] | None = None,
) -> Soak:  # fmt: skip
    """Run and return the finished soak; a server is started when no URL is given."""
    async with AsyncExitStack() as stack:
        if url is not None:
            test = Soak(Endpoint(url), num_streams, minutes * 60, seed, enough=enough or {})
        else:
            model = str(build(folder or default_folder(), size))
            port = servers.free_port()
            log = Path(tempfile.mkdtemp(prefix="vllm-mlx-soak-")) / "server.log"
            command = servers.ours(model, port, server_flags)
            endpoint, _ = await stack.enter_async_context(servers.running(command, port, "default", log=log))
            test = Soak(endpoint, num_streams, minutes * 60, seed, log, enough or {})
        await test.run()
        return test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--url")
    parser.add_argument("--size", default="30m")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("server_flags", nargs="*", help="flags for the server, after `--`")
    options = parser.parse_args()
    test = asyncio.run(soak(
        minutes=options.minutes, num_streams=options.streams, url=options.url, size=options.size, seed=options.seed,
        folder=options.folder, server_flags=options.server_flags,
    ))  # fmt: skip
    for name, count in test.counts.items():
        print(f"{count:>8} {name}")
    for problem in test.problems:
        print(f"PROBLEM: {problem}")
    print("all is back where it was" if not test.problems else f"log: {test.log}")
    return 1 if test.problems else 0


if __name__ == "__main__":
    sys.exit(main())
