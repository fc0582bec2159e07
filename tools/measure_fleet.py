"""What a server with one model pays for what it does not use: `python -m tools.measure_fleet [--rounds 6]`. Linux.

Three servers of the built-in model take turns: as it is started by default (`direct`), in a pool of one
(`--idle-unload-seconds`), and behind a front (`--engine-process`). In each round all are asked the same in a random
order: streams together, then requests one after the other. Shown are medians, and the median and the spread of each
round's ratio to `direct`: tokens a second, processor seconds of the server's processes a thousand tokens, milliseconds
to the first token. Then, in this process, processor time of the engine's decode step with and without what it does for
adapters where there are none.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from vllm_mlx import blas

blas.load()

from tests.serving.process import ServerProcess, serving  # noqa: E402
from vllm_mlx.engine.assembly import EngineOptions, build_engine  # noqa: E402
from vllm_mlx.engine.request import Prompt, Request  # noqa: E402
from vllm_mlx.models.download import resolve  # noqa: E402
from vllm_mlx.models.loader import load  # noqa: E402

WAYS = {"direct": (), "pool of one": ("--idle-unload-seconds", "100000"), "behind a front": ("--engine-process",)}
NUM_STREAMS, NUM_TOKENS, NUM_ALONE = 8, 160, 12
TICKS = os.sysconf("SC_CLK_TCK")


def processor_s(pid: int) -> float:
    """Processor seconds of a process and those it has started."""
    stat = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return (int(stat[11]) + int(stat[12])) / TICKS + sum(processor_s(int(child)) for child in children)


def ask(server: ServerProcess, prompt: str, num_tokens: int) -> tuple[float, int]:
    """Seconds to the first token of a stream, and its tokens."""
    body = {"prompt": prompt, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    start = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body), {"content-type": "application/json"})
    first, last = None, b""
    for line in connection.getresponse():
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - start
            last = line
    connection.close()
    assert first is not None
    return first, int(json.loads(last[6:])["usage"]["completion_tokens"])


def turn(server: ServerProcess, number: int) -> dict[str, float]:
    """One round with one server."""
    prompts = [f"Round {number}, story {i}: once upon a time" for i in range(NUM_STREAMS)]
    spent, start = processor_s(server.process.pid), time.perf_counter()
    with ThreadPoolExecutor(NUM_STREAMS) as pool:
        tokens = sum(found for _, found in pool.map(lambda p: ask(server, p, NUM_TOKENS), prompts))
    wall, spent = time.perf_counter() - start, processor_s(server.process.pid) - spent
    firsts = [ask(server, f"Alone {number} {i}", 1)[0] for i in range(NUM_ALONE)]
    return {"tokens/s": tokens / wall, "CPU s/1000 tokens": 1000 * spent / tokens,
            "first token ms": 1000 * statistics.median(firsts)}  # fmt: skip


def servers(rounds: int) -> None:
    found: dict[str, dict[str, list[float]]] = {way: defaultdict(list) for way in WAYS}
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        flags = ("--repetition-policy", "off", "--speculation", "off", "--log-level", "error")
        running = {
            way: stack.enter_context(serving("demo", *flags, *more, log=Path(name) / f"{i}"))
            for i, (way, more) in enumerate(WAYS.items())
        }
        for number in range(-1, rounds):  # the first to warm up
            for way in random.Random(number).sample(list(WAYS), len(WAYS)):
                for what, value in turn(running[way], number).items():
                    if number >= 0:
                        found[way][what].append(value)
    names = list(found["direct"])
    print(f"| {rounds} rounds, {NUM_STREAMS} streams of {NUM_TOKENS} tokens | " + " | ".join(names) + " |")
    print("| --- |" + " ---: |" * len(names))
    for way, values in found.items():
        cells = []
        for what in names:
            cell = f"{statistics.median(values[what]):.2f}"
            if way != "direct":
                ratios = [a / b for a, b in zip(values[what], found["direct"][what], strict=True)]
                cell += f" ({statistics.median(ratios):.3f}; {min(ratios):.2f} to {max(ratios):.2f})"
            cells.append(cell)
        print(f"| {way} | " + " | ".join(cells) + " |", flush=True)


def step_ms(prompts: Sequence[list[int]], num_steps: int, rounds: int) -> None:
    """Decode steps, with what is said for adapters and with that left out."""
    model = load(resolve("demo")).model
    options = EngineOptions(memory_bytes=1 << 30, prefix_cache_bytes=0, max_rows=len(prompts), seed=0)
    engine = build_engine(model, options, lambda events, status: None)
    own = model.adapters.use
    found: dict[str, list[float]] = defaultdict(list)

    def run(name: str) -> float:
        for i, prompt in enumerate(prompts):
            engine.submit(Request(f"{name}-{i}", Prompt(tuple(prompt)), num_steps + 40))
        for _ in range(20):
            engine.step()
        start = time.process_time()
        for _ in range(num_steps):
            engine.step()
        spent = time.process_time() - start
        engine.cancel_all()
        while engine.has_work:
            engine.step()
        return 1e3 * spent / num_steps

    for number in range(-1, 2 * rounds):
        for way in random.Random(number).sample(["as it is", "without"], 2):
            model.adapters.use = own if way == "as it is" else lambda names: None  # type: ignore[method-assign]
            took = run(f"{number} {way}")
            if number >= 0:
                found[way].append(took)
    ratios = [a / b for a, b in zip(found["as it is"], found["without"], strict=True)]
    shown = ", ".join(f"{way} {statistics.median(values):.3f}" for way, values in found.items())
    print(f"decode step of {len(prompts)} rows, ms of processor time: {shown}; ratio {statistics.median(ratios):.3f} "
          f"({min(ratios):.2f} to {max(ratios):.2f} over {len(ratios)} rounds)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps-only", action="store_true")
    options = parser.parse_args()
    if not options.steps_only:
        servers(options.rounds)
    step_ms([[7 + i] * 16 for i in range(16)], 60, options.rounds)


if __name__ == "__main__":
    main()
