"""The speed this server promises beside others' (`bench --speed`): all sides in one run, interleaved round by round.

Every rival runs on the same OpenBLAS as ours without our few-row kernels, which are part of this server; for who wants
to know what the servers alone are worth, on our kernels too (nothing is promised there); and as it installs. A ratio is
taken in each round against the rival that was best in that round; what counts is the median. asyncio thread.

While one server is measured all others are stopped (SIGSTOP), so that nobody's idle loop takes time from another.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from vllm_mlx.bench import workloads
from vllm_mlx.bench.churn import measure_churn
from vllm_mlx.bench.measure import Summary
from vllm_mlx.bench.numbers import ENGINE, OURS
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.bench.rivals import Blas
from vllm_mlx.bench.targets import HttpTarget, Target, measure
from vllm_mlx.bench.workloads import Conversation

# As long as in the study that the promises were taken from.
ALONE_TOKENS, MANY_TOKENS, FIRST_TOKENS = 48, 32, 8
PROMPT_TOKENS = 2000
COLD, AGAIN = "2k cold", "2k again"
# It takes longer than all others together, and its ratio leaves no doubt.
NUM_ROUNDS_AS_INSTALLED = 2


@dataclass(frozen=True, slots=True)
class Case:
    """One run of each round: `num_requests` answers of `max_tokens` over `num_streams`, on those of `sides`."""

    workload: str
    num_streams: int
    num_requests: int
    max_tokens: int
    sides: frozenset[Blas]


SAME, BOTH = frozenset({Blas.OPENBLAS}), frozenset({Blas.OPENBLAS, Blas.OURS})
CASES = (
    Case("short", 1, 4, ALONE_TOKENS, BOTH),
    Case("short", 16, 16, MANY_TOKENS, BOTH | {Blas.INSTALLED}),
    Case("short", 32, 32, MANY_TOKENS, BOTH),
    Case(COLD, 1, 1, FIRST_TOKENS, SAME),
    Case(AGAIN, 1, 1, FIRST_TOKENS, SAME),
)
# COLD and AGAIN ask the same.
LAST_SEED = next(number for number, case in enumerate(CASES) if case.workload == COLD)


def side_of(name: str) -> Blas | None:
    """The BLAS that a rival's target is named by; None for ours and the engine."""
    return next((blas for blas in Blas if name.endswith(f", {blas}")), None)


async def measure_speed(targets: Mapping[str, Target], report: Report, *, model: str, num_rounds: int, seed: int,
                        say: Callable[[str], None]) -> None:
    """Run all cases on the targets there are, and add the promised numbers to the report."""
    for round_number in range(num_rounds):
        say(f"round {round_number + 1} of {num_rounds}")
        for number, case in enumerate(CASES):
            present = [t for t in targets.values() if _takes_part(t.name, case, round_number)]
            turn = round_number % len(present)
            for target in present[turn:] + present[:turn]:
                conversations = conversations_of(case, seed + 1000 * round_number + min(number, LAST_SEED))
                with alone(target, targets.values()):
                    summary = await measure(target, conversations, case.num_streams)
                report.runs.append(Run(target.name, case.workload, case.num_streams, round_number, summary))
    report.numbers += numbers_of(report)
    say("rows that join and leave")
    with alone(None, targets.values()):
        churn = await measure_churn(model)
    for name, what in (("join", "joins"), ("leave", "leaves")):
        share = 100 * churn[name]
        report.numbers.append(Number(f"a row that {what} 16 others, of a step", share, 5, at_least=False, unit=" %"))


def _takes_part(name: str, case: Case, round_number: int) -> bool:
    if name == OURS:
        return True
    if name == ENGINE:
        return case.workload == "short"
    side = side_of(name)
    return side in case.sides and (side is not Blas.INSTALLED or round_number < NUM_ROUNDS_AS_INSTALLED)


def conversations_of(case: Case, seed: int) -> list[Conversation]:
    kind = "long" if case.workload in (COLD, AGAIN) else case.workload
    return workloads.make(
        kind, case.num_requests, seed=seed, max_tokens=case.max_tokens, prompt_tokens=PROMPT_TOKENS
    )


@contextlib.contextmanager
def alone(target: Target | None, others: Iterable[Target]) -> Iterator[None]:
    """Nobody but the target runs (or nobody at all), of the servers that we started."""
    stopped = [o.pid for o in others if o is not target and isinstance(o, HttpTarget) and o.pid is not None]
    for pid in stopped:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in stopped:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


# ── numbers ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def numbers_of(report: Report) -> list[Number]:
    """The promises, of what was measured; those that need a side that is not there are left out."""
    names = list(dict.fromkeys(run.target for run in report.runs))
    found: list[Number] = []

    def beside(side: Blas, what: str, case: Case, limit: float | None, *, is_time: bool = False) -> None:
        rivals = [name for name in names if side_of(name) is side]
        if rivals:
            value = first_token_ms if is_time else tokens_per_s
            ratios = against_best(report, rivals, case, value, is_less_better=is_time)
            name = f"{what}, times the best rival, {side}"
            found.append(_median(name, ratios, limit, at_least=not is_time, unit="x"))

    alone_, sixteen, thirty_two, cold, again = CASES
    beside(Blas.OPENBLAS, "16 streams", sixteen, 1.8)
    beside(Blas.OPENBLAS, "32 streams", thirty_two, 1.8)
    beside(Blas.OPENBLAS, "1 stream", alone_, 1.2)
    beside(Blas.OPENBLAS, "first token of a new 2k prompt", cold, 0.6, is_time=True)
    times = [value for _, value in _values(report, OURS, again, first_token_ms)]
    found.append(_median("first token of the same 2k prompt again", times, 60, at_least=False, unit=" ms"))
    beside(Blas.INSTALLED, "16 streams", sixteen, 8)
    if ENGINE in names:
        costs = [1000 / ours - 1000 / engine for ours, engine in _paired(report, OURS, ENGINE, sixteen)]
        found.append(_median("16 streams: HTTP's cost of a token", costs, 0.1, at_least=False, unit=" ms"))
    for what, case in (("1 stream", alone_), ("16 streams", sixteen), ("32 streams", thirty_two)):
        beside(Blas.OURS, what, case, None)
    return found


def tokens_per_s(summary: Summary) -> float | None:
    return summary.tokens_per_s or None


def first_token_ms(summary: Summary) -> float | None:
    return summary.ttft_ms.p50


def against_best(
    report: Report, rivals: Sequence[str], case: Case, value: Callable[[Summary], float | None], *, is_less_better: bool
) -> list[float]:
    """For each round that ours and every rival ran without failure: ours over the best rival's."""
    theirs = [dict(_values(report, name, case, value)) for name in rivals]
    best = min if is_less_better else max
    return [
        ours / best(found[number] for found in theirs)
        for number, ours in _values(report, OURS, case, value)
        if all(number in found for found in theirs)
    ]


def _values(report: Report, target: str, case: Case, value: Callable[[Summary], float | None]
            ) -> list[tuple[int, float]]:
    """(round, value) of each round in which every request was answered."""
    wanted = (target, case.workload, case.num_streams)
    runs = [run for run in report.runs if (run.target, run.workload, run.num_streams) == wanted]
    found = [(run.round, value(run.summary)) for run in runs if not run.summary.num_failed]
    return [(number, v) for number, v in found if v is not None]


def _paired(report: Report, first: str, second: str, case: Case) -> list[tuple[float, float]]:
    a, b = (dict(_values(report, name, case, tokens_per_s)) for name in (first, second))
    return [(a[number], b[number]) for number in a if number in b]


def _median(name: str, values: Sequence[float], limit: float | None, *, at_least: bool, unit: str) -> Number:
    # Nothing measured is a number missed; the runs' own errors say why.
    value = statistics.median(values) if values else 0.0 if at_least else float("inf")
    return Number(name, value, limit, at_least, unit, tuple(values))
