"""Many clients, a prefix cache that is far too small, a disk tier: does anybody ever see another's tokens?

    python -m tools.canary --minutes 10 --kind attention        (or window, hybrid, mla)

Every conversation is first asked alone, on a server without any cache: its greedy answers are the canaries. Then 32
clients ask random turns of random conversations at once, some of which share their beginnings, while blocks are
evicted, written, and read back; with `--batch-invariant` each answer must be the canary's, to the letter. A KV block, a
state or a row that went to the wrong request changes the text of these models.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx.bench import servers
from vllm_mlx.bench.agent import EXTRA, get_json
from vllm_mlx.bench.agent_models import KINDS, build_kind
from vllm_mlx.bench.client import Endpoint, stream_chat
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.workloads import Message, Writer

FLAGS = ["--batch-invariant", "--runtime-mode", "batched"]


@dataclass(frozen=True)
class Turn:
    messages: tuple[Message, ...]
    max_tokens: int


def make_turns(seed: int, num_conversations: int, num_turns: int) -> list[list[Turn]]:
    """Conversations with the user's turns fixed; a quarter of them share a stem."""
    writer, rng = Writer(seed), random.Random(seed)
    stems = [writer.text(400) for _ in range(2)]
    conversations = []
    for number in range(num_conversations):
        opening = stems[number % 2] if number % 4 == 0 else writer.text(rng.randint(100, 700))
        messages: list[Message] = [{"role": "system", "content": opening}]
        turns = []
        for _ in range(num_turns):
            messages.append({"role": "user", "content": writer.text(rng.randint(20, 200))})
            turns.append(Turn(tuple(messages), rng.choice([8, 16, 24])))
            messages.append({"role": "assistant", "content": writer.text(30)})
        conversations.append(turns)
    return conversations


async def ask(endpoint: Endpoint, turn: Turn) -> tuple[str, int]:
    """The answer's text, and the tokens that came from the cache."""
    body = {
        "model": endpoint.model, "messages": list(turn.messages), "max_tokens": turn.max_tokens, "stream": True,
        "stream_options": {"include_usage": True}, **EXTRA,
    }  # fmt: skip
    trace = await stream_chat(endpoint, body)
    if trace.error is not None:
        raise RuntimeError(trace.error)
    return trace.text, trace.num_cached_tokens or 0


async def canary(
    *,
    kind: str,
    minutes: float,
    num_asked: int = 1 << 60,
    num_clients: int = 32,
    num_conversations: int = 40,
    folder: Path | None = None,
) -> tuple[Counter[str], list[str]]:
    """Counts of what happened, and a line for each answer that was not its canary's."""
    model = str(build_kind(folder or default_folder(), kind))
    conversations = make_turns(1, num_conversations, 3)
    turns = [turn for conversation in conversations for turn in conversation]
    expected: dict[int, str] = {}
    port = servers.free_port()
    command = servers.ours(model, port, [*FLAGS, "--disable-prefix-cache"])
    async with servers.running(command, port, "default") as (endpoint, _):
        for index, turn in enumerate(turns):
            expected[index], _ = await ask(endpoint, turn)

    counts: Counter[str] = Counter(turns=len(turns), different_answers=len(set(expected.values())))
    wrong: list[str] = []
    with tempfile.TemporaryDirectory(prefix="vllm-mlx-canary-") as disk:
        port = servers.free_port()
        flags = [*FLAGS, "--cache-memory-mb", "16", "--disk-cache", disk, "--disk-cache-gb", "0.06",
                 "--disk-cache-min-tokens", "64"]  # fmt: skip
        async with servers.running(servers.ours(model, port, flags), port, "default") as (endpoint, _):
            until = time.monotonic() + minutes * 60

            async def client(number: int) -> None:
                rng = random.Random(number)
                while time.monotonic() < until and counts["asked"] < num_asked:
                    index = rng.randrange(len(turns))
                    text, num_cached = await ask(endpoint, turns[index])
                    counts["asked"] += 1
                    counts["with a prefix from the cache"] += num_cached > 0
                    counts["cached tokens"] += num_cached
                    if text != expected[index]:
                        others = [i for i, other in expected.items() if other == text]
                        wrong.append(
                            f"turn {index} ({num_cached} cached): {text!r} is not {expected[index]!r} {others}"
                        )

            await asyncio.gather(*(client(number) for number in range(num_clients)))
            stats: dict[str, Any] = await asyncio.to_thread(get_json, endpoint, "/v1/cache/stats")
    counts["evictions"] = stats["num_evictions"]
    counts.update({f"disk: {name}": value for name, value in stats["disk"].items() if isinstance(value, int)})
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--conversations", type=int, default=40)
    parser.add_argument("--kind", choices=KINDS, default="attention")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    counts, wrong = asyncio.run(canary(
        kind=options.kind, minutes=options.minutes, num_clients=options.clients,
        num_conversations=options.conversations, folder=options.folder,
    ))  # fmt: skip
    for name, count in counts.items():
        print(f"{count:>10} {name}")
    for line in wrong[:20]:
        print(f"PROBLEM: {line}")
    print(f"{len(wrong)} of {counts['asked']} answers were not their canary's")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
