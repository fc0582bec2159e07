"""The numbers this server promises, each measured with both sides in one run, interleaved round by round.

  HTTP cost     throughput over HTTP against the engine alone, at 1 and 32 streams
  prefix reuse  tokens computed for a long prompt that was seen before, but for its last line
  mlx-lm        throughput of both servers on the same model and BLAS, at 1 and 16 streams; and as each installs
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Mapping, Sequence

from vllm_mlx.bench import workloads
from vllm_mlx.bench.measure import summarize
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.bench.targets import HttpTarget, Target, measure

OURS, ENGINE = "vllm-mlx", "engine in process"
# The promises are about the library under both, without our kernels for products of few rows, which are part of this
# server; with them on the other side too one sees what the servers alone are worth.
SAME_BLAS, OUR_BLAS, AS_INSTALLED = "mlx-lm, same OpenBLAS", "mlx-lm, our BLAS", "mlx-lm, as installed"
BLOCK = 64
# It takes longer than all others together, and its ratio leaves no doubt.
NUM_ROUNDS_AS_INSTALLED = 2

# (workload, streams, requests, targets) of each round. One stream alone is asked several times: it is short, and so
# noisy. `short` is one burst of equal requests, `mixed` is traffic: long and short, coming and going.
CASES: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("short", 1, 4, (OURS, ENGINE, SAME_BLAS, OUR_BLAS)),
    ("short", 16, 16, (OURS, SAME_BLAS, OUR_BLAS, AS_INSTALLED)),
    ("short", 32, 32, (OURS, ENGINE)),
    ("mixed", 16, 48, (OURS, SAME_BLAS, OUR_BLAS)),
)
MIXED_PROMPT_TOKENS = 400


async def measure_numbers(targets: Mapping[str, Target], report: Report, *, num_rounds: int, max_tokens: int, seed: int
                  ) -> None:
    """Run all cases on the targets there are, and add the numbers they give to the report."""
    for round_number in range(num_rounds):
        for case, (workload, num_streams, num_requests, names) in enumerate(CASES):
            present = [targets[name] for name in names if name in targets]
            if round_number >= NUM_ROUNDS_AS_INSTALLED:
                present = [target for target in present if target.name != AS_INSTALLED]
            order = present[round_number % len(present) :] + present[: round_number % len(present)]
            for target in order:
                conversations = workloads.make(
                    workload,
                    num_requests,
                    seed=seed + 100 * round_number + case,
                    max_tokens=max_tokens,
                    prompt_tokens=MIXED_PROMPT_TOKENS,
                )
                summary = await measure(target, conversations, num_streams)
                report.runs.append(Run(target.name, workload, num_streams, round_number, summary))
    if ENGINE in targets:
        for num_streams in (1, 32):
            name = "HTTP cost at 1 stream" if num_streams == 1 else f"HTTP cost at {num_streams} streams"
            add_ratio(report, name, ENGINE, OURS, num_streams, limit=10, as_cost=True)
    for rival, words, many, one in ((SAME_BLAS, "the same OpenBLAS", 1.3, 1.0), (OUR_BLAS, "our BLAS", None, None)):
        if rival in targets:
            for workload, what in (("short", "a burst"), ("mixed", "traffic")):
                name = f"16 streams, {what}, times mlx-lm on {words}"
                add_ratio(report, name, OURS, rival, 16, limit=many, workload=workload)
            add_ratio(report, f"1 stream, times mlx-lm on {words}", OURS, rival, 1, limit=one)
    if AS_INSTALLED in targets:
        add_ratio(report, "16 streams, times mlx-lm as each installs", OURS, AS_INSTALLED, 16, limit=6)
    ours = targets[OURS]
    assert isinstance(ours, HttpTarget)
    await measure_reuse(ours, report, seed=seed, num_rounds=num_rounds)


def add_ratio(
    report: Report, name: str, first: str, second: str, num_streams: int, *, limit: float | None,
    as_cost: bool = False, workload: str = "short",
) -> None:  # fmt: skip
    """Median over the rounds of first / second; as a cost, the share (percent) that the second loses."""
    pairs = [_rates(report, target, workload, num_streams) for target in (first, second)]
    ratios = [a / b for a, b in zip(*pairs, strict=False) if a and b]  # the installed mlx-lm has fewer rounds
    values = tuple(100 * (1 - 1 / ratio) for ratio in ratios) if as_cost else tuple(ratios)
    # Nothing measured is a number missed; the runs' own errors say why.
    value = statistics.median(values) if values else math.inf if as_cost else 0.0
    report.numbers.append(Number(name, value, limit, at_least=not as_cost, unit=" %" if as_cost else "x",
                                 rounds=values))  # fmt: skip


async def measure_reuse(target: HttpTarget, report: Report, *, seed: int, num_rounds: int) -> None:
    """Tokens computed for the second of two prompts, beyond those that differ: one block at most."""
    excess = []
    for round_number in range(num_rounds):
        first, second = workloads.repeated_with_new_line(seed + 1000 + round_number, max_tokens=4)
        before = await target.run([first], 1)
        after = await target.run([second], 1)
        computed = (after[0].num_prompt_tokens or 0) - after[0].num_cached_tokens
        old, new = await target.token_ids(first), await target.token_ids(second)
        num_common = len(os.path.commonprefix([old, new]))
        excess.append(float(computed - (len(new) - num_common)))
        for step, traces in enumerate((before, after)):
            report.runs.append(Run(target.name, f"2,000 tokens {('first', 'new last line')[step]}", 1, round_number,
                                   summarize(traces)))  # fmt: skip
    report.numbers.append(Number("2,000-token prompt, new last line: tokens computed beyond the new ones",
                                 max(excess), BLOCK, at_least=False, rounds=tuple(excess)))  # fmt: skip


def _rates(report: Report, target: str, workload: str, num_streams: int) -> Sequence[float]:
    return [
        r.summary.tokens_per_s
        for r in sorted(report.runs, key=lambda r: r.round)
        if (r.target, r.workload, r.num_streams) == (target, workload, num_streams)
    ]
