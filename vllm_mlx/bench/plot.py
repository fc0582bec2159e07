"""Draws what a benchmark measured: `--plot FILE.png` (or .svg, .pdf). Needs the extra `plot` (matplotlib).

One panel each for throughput, time to the first token and the gap between tokens, a bar a target and case, a dot a
round; and one for the promises, as a share of what was promised. Thread: whoever calls; no window is opened.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vllm_mlx.bench.measure import Summary
from vllm_mlx.bench.report import Number, Run
from vllm_mlx.errors import SettingsError

FORMATS = (".png", ".svg", ".pdf")
PANELS: tuple[tuple[str, Callable[[Summary], float | None]], ...] = (
    ("output, tokens/s", lambda summary: summary.tokens_per_s),
    ("time to the first token, p50, ms", lambda summary: summary.ttft_ms.p50),
    ("gap between tokens, p50, ms", lambda summary: summary.itl_ms.p50),
)
# Told apart also by those who do not see all colours (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
MET, MISSED = "#009E73", "#D55E00"
BAR, WIDTH = 0.2, 11.0  # inches


def check(path: str | None) -> None:
    """Refuse now, rather than after the measurement, what could not be drawn. Raises SettingsError."""
    if path is None:
        return
    if Path(path).suffix.lower() not in FORMATS:
        raise SettingsError(f"--plot takes a file that ends in {', '.join(FORMATS)}, not {path!r}.")
    if not Path(path).absolute().parent.is_dir():
        raise SettingsError(f"--plot {path}: there is no such folder.")
    if find_spec("matplotlib") is None:
        raise SettingsError("--plot needs matplotlib (the extra `plot`): pip install matplotlib.")


def draw(path: str, runs: Sequence[Run], numbers: Sequence[Number], title: str) -> None:
    """Write the figure. What has no values has no panel; with nothing at all, nothing is written."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # an extra
    from matplotlib.figure import Figure

    targets = list(dict.fromkeys(run.target for run in runs))
    cases = sorted({(run.workload, run.num_streams) for run in runs})
    panels = [panel for panel in PANELS if any(panel[1](run.summary) for run in runs)]
    promised = [number for number in numbers if number.limit]
    heights = [len(cases) * (len(targets) + 1) * BAR + 0.8] * len(panels)
    heights += [len(promised) * 1.6 * BAR + 0.8] * bool(promised)
    if not heights:
        return
    figure = Figure(figsize=(WIDTH, sum(heights) + 0.8), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=9)
    axes = figure.subplots(len(heights), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for axis, (name, value) in zip(axes, panels, strict=False):
        _bars(axis, name, value, runs, targets, cases)
    if panels:
        figure.legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="outside lower center", ncols=3)
    if promised:
        _promises(axes[-1], promised)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, name: str, value: Callable[[Summary], float | None], runs: Sequence[Run], targets: Sequence[str],
          cases: Sequence[tuple[str, int]]) -> None:
    labels: dict[float, str] = {}
    for place, case in enumerate(cases):
        base = place * (len(targets) + 1)
        labels[base + (len(targets) - 1) / 2] = f"{case[0]}, {case[1]} stream{'s' if case[1] > 1 else ''}"
        for row, target in enumerate(targets):
            found = [value(r.summary) for r in runs if (r.target, r.workload, r.num_streams) == (target, *case)]
            known = [v for v in found if v is not None]
            if not known:
                continue
            colour = COLOURS[row % len(COLOURS)]
            median = statistics.median(known)
            axis.barh(base + row, median, color=colour, alpha=0.6, label=target if place == 0 else None)
            axis.plot(known, [base + row] * len(known), "o", color=colour, markersize=2.5)
            axis.annotate(f" {median:.4g}", (median, base + row), va="center", fontsize=6)
    axis.set_yticks(list(labels), list(labels.values()), fontsize=7)
    axis.tick_params(axis="x", labelsize=7)
    axis.invert_yaxis()
    axis.set_xlabel(name, fontsize=8)


def _promises(axis: Any, numbers: Sequence[Number]) -> None:
    """How much of its promise each number is; of "at most" as of "at least", over 1 is better."""
    for row, number in enumerate(numbers):
        assert number.limit
        share = number.value / number.limit if number.at_least else number.limit / number.value if number.value else 2.0
        sign = ">=" if number.at_least else "<="
        axis.barh(row, min(share, 3.0), color=MET if number.is_met else MISSED, alpha=0.7)
        text = f" {number.value:.3g}{number.unit} ({sign} {number.limit:g}{number.unit})"
        axis.annotate(text, (min(share, 3.0), row), va="center", fontsize=6)
    axis.axvline(1.0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(numbers)), [number.name for number in numbers], fontsize=6)
    axis.set_xlim(0, 3.6)
    axis.invert_yaxis()
    axis.tick_params(axis="x", labelsize=7)
    axis.set_xlabel("measured, as a share of what is promised (1: just met; bars end at 3)", fontsize=8)
