"""What guessing ahead and computing prompts together bring, in the engine alone: `python tools/measure_engine.py
[together] [new] [again]`.

Two engines on one random model, the same requests, in turns; greedy. Times are processor time of this process, which a
busy machine changes little; ratios are medians over the rounds, and answers must be equal token for token.

    together   16 prompts of about 38 tokens at once: in packs, against one by one
    new        prompts never seen before, guessing against not: guesses must cost nothing
    again      the same requests a second time, guessing from the first answers
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Sequence

from vllm_mlx import blas

blas.load()  # before MLX

from vllm_mlx.bench.main import default_folder  # noqa: E402
from vllm_mlx.bench.model import build  # noqa: E402
from vllm_mlx.engine import speculative  # noqa: E402
from vllm_mlx.engine.assembly import EngineOptions, build_engine  # noqa: E402
from vllm_mlx.engine.request import Prompt, Request  # noqa: E402
from vllm_mlx.engine.step import EngineStatus, TokenEvent  # noqa: E402
from vllm_mlx.models.loader import load  # noqa: E402

ROUNDS = 5
NUM_TOKENS = 64


class ProcessorClock:
    """So that the engine judges what guessing costs by the same clock."""

    perf_counter = staticmethod(time.process_time)


class Subject:
    """An engine; `run` gives the seconds and the answers."""

    def __init__(self, model: object, speculation: str = "off") -> None:
        self._answers: dict[str, list[int]] = defaultdict(list)
        self._count = 0
        options = EngineOptions(memory_bytes=4 << 30, prefix_cache_bytes=1 << 30, speculation=speculation)
        self.engine = build_engine(model, options, self._publish)  # type: ignore[arg-type]

    def run(self, prompts: Sequence[Sequence[int]], num_tokens: int = NUM_TOKENS) -> tuple[float, list[list[int]]]:
        names = []
        for prompt in prompts:
            self._count += 1
            names.append(f"r{self._count}")
            self.engine.submit(Request(names[-1], Prompt(tuple(prompt)), num_tokens))
        started = time.process_time()
        while self.engine.has_work:
            self.engine.step()
        return time.process_time() - started, [self._answers.pop(name) for name in names]

    def _publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        for event in events:
            self._answers[event.request_id] += event.token_ids


def compare(plain: Subject, better: Subject, prompts: Sequence[Sequence[int]], number: int, num_tokens: int) -> float:
    """How many times faster the second is; which goes first changes with the round."""
    sides = (plain, better) if number % 2 else (better, plain)
    found = {side: side.run(prompts, num_tokens) for side in sides}
    if found[plain][1] != found[better][1]:
        print("  answers differ: rounding can do that where two tokens are equally likely", file=sys.stderr)
    return found[plain][0] / found[better][0]


def main(parts: Sequence[str]) -> None:
    speculative.time = ProcessorClock  # type: ignore[assignment]
    model = load(build(default_folder(), "30m")).model
    rng = random.Random(0)

    def prompts(count: int) -> list[list[int]]:
        return [[rng.randrange(20, 8000) for _ in range(rng.randint(35, 42))] for _ in range(count)]

    one_by_one, packed, guessing = Subject(model), Subject(model), Subject(model, "auto")
    one_by_one.engine.runner.can_pack = False  # type: ignore[attr-defined]
    for side in (one_by_one, packed, guessing):
        side.run(prompts(2), 4)

    def show(name: str, ratios: list[float]) -> None:
        print(f"{name:44s} {statistics.median(ratios):5.2f} times   {' '.join(f'{r:.2f}' for r in ratios)}", flush=True)

    if "together" in parts:
        show("together: 16 prompts and their first token",
             [compare(one_by_one, packed, prompts(16), i, 1) for i in range(ROUNDS)])  # fmt: skip
    for rows in (1, 8, 16) if "new" in parts else ():
        show(f"new, {rows} rows", [compare(packed, guessing, prompts(rows), i, NUM_TOKENS) for i in range(ROUNDS)])
    for rows in (1, 4, 16) if "again" in parts else ():
        ratios = []
        for i in range(ROUNDS):
            asked = prompts(rows)
            for side in (packed, guessing):
                side.run(asked)
            ratios.append(compare(packed, guessing, asked, i, NUM_TOKENS))
        show(f"again, {rows} rows", ratios)
    speculator = guessing.engine.runner.speculator  # type: ignore[attr-defined]
    print(", ".join(f"{k} {v}" for k, v in speculator.metrics().items()))


if __name__ == "__main__":
    main(sys.argv[1:] or ("together", "new", "again"))
