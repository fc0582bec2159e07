"""Runs as a table for people, and as JSON for machines."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from vllm_mlx import machine
from vllm_mlx.bench.floor import Floor, as_dict
from vllm_mlx.bench.measure import Percentiles, Summary


@dataclass(frozen=True, slots=True)
class Run:
    """One round of one workload on one target."""

    target: str
    workload: str
    num_streams: int
    round: int
    summary: Summary


@dataclass(frozen=True, slots=True)
class Number:
    """A promise and what was measured; without a limit nothing is promised. `rounds` are the single values that `value`
    is the median of."""

    name: str
    value: float
    limit: float | None
    at_least: bool
    unit: str = ""
    rounds: tuple[float, ...] = ()

    @property
    def is_met(self) -> bool:
        if self.limit is None:
            return True
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(slots=True)
class Report:
    runs: list[Run] = field(default_factory=list)
    numbers: list[Number] = field(default_factory=list)
    floor: Floor | None = None

    def median_of(self, target: str, workload: str, num_streams: int) -> float | None:
        """Median throughput over the rounds."""
        rates = [r.summary.tokens_per_s for r in self._select(target, workload, num_streams)]
        return statistics.median(rates) if rates else None

    @staticmethod
    def title() -> str:
        """The machine in a line, for a figure."""
        facts = machine.describe()
        versions = ", ".join(f"{name} {found}" for name, found in facts["versions"].items() if found)
        return f"{facts['processor'] or facts['system']}, {facts['cores']} cores; {versions}"

    def to_json(self) -> str:
        document = {
            "machine": {**machine.describe(), "floor": as_dict(self.floor)},
            "runs": [asdict(run) for run in self.runs],
            "numbers": [{**asdict(n), "is_met": n.is_met} for n in self.numbers],
        }
        return json.dumps(document, indent=1)

    def show(self, console: Console) -> None:
        if self.floor is not None:
            console.print(f"{self.floor}.")
        if self.runs:
            console.print(self._table())
        if self.numbers:
            console.print(self._numbers_table())
        failures = [(r.target, r.workload, r.summary) for r in self.runs if r.summary.num_failed]
        for target, workload, summary in failures:
            console.print(f"{target}, {workload}: {summary.num_failed} failed, first: {summary.first_error}")

    def _select(self, target: str, workload: str, num_streams: int) -> list[Run]:
        return [
            r for r in self.runs if (r.target, r.workload, r.num_streams) == (target, workload, num_streams)
        ]

    def _table(self) -> Table:
        table = Table(title="Medians over the rounds; times in milliseconds")
        for name in ("workload", "streams", "target"):
            table.add_column(name)
        for name in ("tok/s", "CPU ms/tok", "TTFT p50", "p95", "ITL p50", "p95", "p99", "of floor", "prompt", "cached",
                     "failed", "rounds"):  # fmt: skip
            table.add_column(name, justify="right")
        cases = list(dict.fromkeys((r.workload, r.num_streams, r.target) for r in self.runs))
        for workload, num_streams, target in sorted(cases, key=lambda c: (c[0], c[1])):
            runs = [r.summary for r in self._select(target, workload, num_streams)]
            table.add_row(
                workload, str(num_streams), target,
                _shown(_median(s.tokens_per_s for s in runs)),
                _shown(_median(s.cpu_ms_per_token for s in runs), 2),
                *_percentiles([s.ttft_ms for s in runs], "p50", "p95"),
                *_percentiles([s.itl_ms for s in runs], "p50", "p95", "p99"),
                self._share_of_floor(num_streams, [s.itl_ms.p50 for s in runs]),
                _shown(_median(s.num_prompt_tokens for s in runs), 0),
                _shown(_median(s.num_cached_tokens for s in runs), 0),
                str(sum(s.num_failed for s in runs)), str(len(runs)),
            )  # fmt: skip
        return table

    def _share_of_floor(self, num_streams: int, gaps_ms: Sequence[float | None]) -> str:
        """How much of a gap between tokens the machine could not do without."""
        gap = _median(gaps_ms)
        return "-" if self.floor is None or not gap else f"{100 * self.floor.step_ms(num_streams) / gap:.0f} %"

    def _numbers_table(self) -> Table:
        table = Table(title="Numbers")
        for name in ("number", "measured", "wanted", "", "rounds"):
            table.add_column(name)
        for number in self.numbers:
            sign = ">=" if number.at_least else "<="
            wanted, verdict = "-", ""
            if number.limit is not None:
                wanted = f"{sign} {number.limit:g}{number.unit}"
                verdict = "met" if number.is_met else "MISSED"
            rounds = " ".join(f"{value:.2f}" for value in number.rounds)
            table.add_row(number.name, f"{number.value:.2f}{number.unit}", wanted, verdict, rounds)
        return table


def _median(values: Any) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if known else None


def _percentiles(found: Sequence[Percentiles], *names: str) -> list[str]:
    return [_shown(_median(getattr(p, name) for p in found)) for name in names]


def _shown(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
