"""Numbers out of times, promises out of numbers, and the command line's refusals."""

from __future__ import annotations

import json
import random

import pytest
from rich.console import Console

from vllm_mlx.bench.floor import Floor
from vllm_mlx.bench.main import parse
from vllm_mlx.bench.measure import Trace, percentile, summarize
from vllm_mlx.bench.numbers import ENGINE, OURS, add_ratio
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.bench.workloads import WORKLOADS, make, repeated_with_new_line
from vllm_mlx.errors import SettingsError


def trace(started: float, stamps: list[float], *, tokens: int | None = None, turn: int = 0) -> Trace:
    return Trace(started, stamps[-1], stamps, 10, tokens or len(stamps), 2, turn=turn)


def test_a_run_counts_from_the_first_request_to_the_last_byte() -> None:
    summary = summarize([trace(0.0, [1.0, 1.5, 2.0]), trace(0.5, [1.5, 3.5, 5.0]), Trace(0.0, 9.0, error="lost")])
    assert summary.wall_s == 5.0 and summary.tokens_per_s == pytest.approx(6 / 5)
    assert summary.ttft_ms.p50 == 1000 and summary.itl_ms.p95 == 2000 and summary.tpot_ms.p95 == 1750
    assert (summary.num_ok, summary.num_failed, summary.first_error, summary.num_cached_tokens) == (2, 1, "lost", 4)


def test_joined_tokens_lengthen_gaps_but_not_the_time_per_token() -> None:
    summary = summarize([trace(0.0, [1.0, 2.0], tokens=5)])
    assert summary.itl_ms.p50 == 1000 and summary.tpot_ms.p50 == 250


def test_percentiles_are_values_that_occurred() -> None:
    values = sorted(random.Random(1).random() for _ in range(101))
    assert percentile(values, 0.5) == round(values[50], 3) and percentile(values, 0.99) == round(values[99], 3)
    assert percentile([], 0.5) is None


def test_turns_of_conversations_are_told_apart() -> None:
    summary = summarize([trace(0, [4.0]), trace(0, [2.0]), trace(10, [10.5], turn=1)])
    assert summary.ttft_by_turn_ms == (3000.0, 500.0)


def test_nothing_measured_is_zero_and_not_an_error() -> None:
    assert summarize([]).tokens_per_s == 0.0


def report_of(*rates: tuple[str, float]) -> Report:
    report = Report()
    for number, (target, rate) in enumerate(rates):
        tokens = round(rate * 10)
        traces = [Trace(0.0, 10.0, [1.0, 10.0], num_completion_tokens=tokens)]
        report.runs.append(Run(target, "short", 1, number // 2, summarize(traces)))
    return report


def test_a_cost_is_what_the_second_loses_of_the_first_round_by_round() -> None:
    report = report_of((ENGINE, 100), (OURS, 80), (OURS, 99), (ENGINE, 110), (ENGINE, 100), (OURS, 95))
    add_ratio(report, "cost", ENGINE, OURS, 1, limit=11, as_cost=True)
    add_ratio(report, "ratio", OURS, ENGINE, 1, limit=0.95)
    cost, ratio = report.numbers
    assert cost.rounds == pytest.approx((20, 10, 5)) and cost.value == pytest.approx(10) and cost.is_met
    assert ratio.value == pytest.approx(0.9) and not ratio.is_met


def test_the_report_reads_as_table_and_as_json() -> None:
    report = report_of((OURS, 123.4))
    report.numbers.append(Number("a promise", 1.5, 1.3, at_least=True, unit="x", rounds=(1.5,)))
    console = Console(record=True, width=150, quiet=False, file=open("/dev/null", "w"))
    report.show(console)
    text = console.export_text()
    assert "123.4" in text and "a promise" in text and "met" in text and "MISSED" not in text
    document = json.loads(report.to_json())
    assert document["numbers"][0]["is_met"] is True and document["machine"]["cores"] >= 1
    assert document["runs"][0]["summary"]["tokens_per_s"] == pytest.approx(123.4)


@pytest.mark.parametrize("workload", WORKLOADS)
def test_a_workload_is_the_same_for_the_same_seed_only(workload: str) -> None:
    one, same, other = (make(workload, 3, seed=s, max_tokens=8, prompt_tokens=200) for s in (1, 1, 2))
    assert one == same != other and len(one) == 3


def test_shared_prompts_begin_alike_and_long_ones_do_not() -> None:
    shared = make("shared", 2, seed=1, max_tokens=8)
    assert shared[0].opening[0] == shared[1].opening[0] and shared[0].opening[1] != shared[1].opening[1]
    long = make("long", 2, seed=1, max_tokens=8)
    assert long[0].opening[0]["content"][:20] != long[1].opening[0]["content"][:20]
    assert len(make("multi-turn", 1, seed=1, max_tokens=8)[0].followups) == 3


def test_a_repeated_prompt_differs_in_its_last_line_only() -> None:
    first, second = (c.opening[0]["content"].split("\n") for c in repeated_with_new_line(1, max_tokens=4))
    assert first[:-1] == second[:-1] and first[-1] != second[-1]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--workload", "short,nonsense"], "nonsense"),
        (["--streams", "1,many"], "--streams"),
        (["--rounds", "0"], "--rounds"),
        (["--url", "http://h/v1", "--rival", "mlx-lm"], "--url"),
        (["--compare", "http://h/v1"], "--compare needs --url"),
        (["--numbers", "--url", "http://h/v1"], "--numbers"),
    ],
)
def test_flags_that_contradict_each_other_are_refused(argv: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse(argv)


def test_a_step_can_be_no_faster_than_reading_the_weights_or_multiplying_them() -> None:
    floor = Floor(bytes_per_s=1e9, flop_per_s=1e11, weights_bytes=10_000_000, num_weights=5_000_000)
    assert floor.step_ms(1) == pytest.approx(10.0)  # reading
    assert floor.step_ms(200) == pytest.approx(20.0)  # multiplying


def test_the_table_says_how_much_of_a_gap_the_machine_needs() -> None:
    report = report_of((OURS, 100))
    report.floor = Floor(1e9, 1e12, 900_000_000, 225_000_000)
    console = Console(record=True, width=200)
    report.show(console)
    assert "10 %" in console.export_text()  # 900 ms of a gap of 9 s
    assert json.loads(report.to_json())["machine"]["floor"]["weights_bytes"] == 900_000_000


def test_the_same_request_comes_again_right_after_the_first() -> None:
    made = make("again", 5, seed=1, max_tokens=8)
    assert len(made) == 5 and made[0] == made[1] and made[2] == made[3] and made[0] != made[2]


@pytest.mark.parametrize("argv", (["--profile", "--url", "http://a/v1"], ["--offline", "--workload", "structured"]))
def test_what_the_engine_alone_cannot_show_is_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        parse(argv)
