"""Other projects' servers: how they are started, and what becomes of a comparison with several of them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_mlx.bench.churn import excess
from vllm_mlx.bench.main import parse
from vllm_mlx.bench.measure import Trace, summarize
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.bench.rivals import RIVALS, Blas, command, interpreters, version_of
from vllm_mlx.bench.speed import AGAIN, CASES, COLD, alone, conversations_of, measure_speed, numbers_of
from vllm_mlx.bench.targets import HttpTarget
from vllm_mlx.errors import SettingsError

A, B = "mlx-vlm 1, same OpenBLAS", "vllm-mlx 1, same OpenBLAS"


def run(target: str, workload: str, streams: int, tokens_per_s: float, *, ttft_ms: float = 100, round: int = 0,
        error: str | None = None) -> Run:
    trace = Trace(0.0, 10.0, [ttft_ms / 1000, 10.0], num_completion_tokens=int(tokens_per_s * 10), error=error)
    return Run(target, workload, streams, round, summarize([trace]))



def number(report: Report, name: str) -> Number:
    return next(n for n in numbers_of(report) if n.name == name)


def test_each_round_is_compared_with_the_rival_that_was_best_in_it() -> None:
    report = Report()
    for n, (ours, a, b) in enumerate([(400, 200, 100), (300, 100, 200), (100, 100, 90)]):
        report.runs += [run("vllm-mlx", "short", 16, ours, round=n), run(A, "short", 16, a, round=n),
                        run(B, "short", 16, b, round=n)]  # fmt: skip
    found = number(report, "16 streams, times the best rival, same OpenBLAS")
    assert found.rounds == (2.0, 1.5, 1.0) and found.value == 1.5 and found.limit == 1.8 and not found.is_met


def test_a_round_in_which_somebody_failed_does_not_count_and_none_at_all_is_a_number_missed() -> None:
    report = Report()
    for n, error in enumerate((None, "lost")):
        report.runs += [run("vllm-mlx", "short", 16, 400, round=n), run(A, "short", 16, 100, round=n, error=error)]
    name = "16 streams, times the best rival, same OpenBLAS"
    assert number(report, name).rounds == (4.0,)
    report.runs = [r for r in report.runs if r.round == 1]
    assert number(report, name).value == 0 and not number(report, name).is_met


def test_the_first_token_is_compared_with_the_fastest_rivals() -> None:
    report = Report()
    report.runs = [run(t, COLD, 1, 1, ttft_ms=ms) for t, ms in (("vllm-mlx", 2500), (A, 5000), (B, 10_000))]
    report.runs += [run("vllm-mlx", AGAIN, 1, 1, ttft_ms=61)]
    assert number(report, "first token of a new 2k prompt, times the best rival, same OpenBLAS").value == 0.5
    assert not number(report, "first token of the same 2k prompt again").is_met


def test_https_cost_is_the_difference_of_two_times_a_token() -> None:
    report = Report()
    report.runs = [run("vllm-mlx", "short", 16, 400), run("engine in process", "short", 16, 500)]
    found = number(report, "16 streams: HTTP's cost of a token")
    assert found.value == pytest.approx(2.5 - 2.0) and not found.is_met


def test_nothing_is_promised_on_our_own_kernels() -> None:
    report = Report()
    report.runs = [run("vllm-mlx", "short", 16, 100), run("mlx-vlm 1, our BLAS", "short", 16, 400)]
    found = number(report, "16 streams, times the best rival, our BLAS")
    assert found.limit is None and found.is_met and found.value == 0.25


def test_a_long_prompt_comes_again_as_it_was() -> None:
    cold, again = (next(case for case in CASES if case.workload == name) for name in (COLD, AGAIN))
    assert conversations_of(cold, 7) == conversations_of(again, 7)


class Rival:
    """A target that answers at once, and notes what it was asked."""

    pid = None

    def __init__(self, name: str) -> None:
        self.name = name
        self.asked: list[object] = []

    async def run(self, conversations: object, num_streams: int) -> list[Trace]:
        self.asked.append(conversations)
        return [Trace(0.0, 1.0, [0.5, 1.0], num_completion_tokens=2)]


async def test_all_sides_are_asked_the_same_in_each_round(monkeypatch: pytest.MonkeyPatch) -> None:
    async def churn(model: str) -> dict[str, float]:
        return {"join": 0.01, "leave": 0.2}

    monkeypatch.setattr("vllm_mlx.bench.speed.measure_churn", churn)
    targets = {name: Rival(name) for name in ("vllm-mlx", A, B, "mlx-vlm 1, as installed")}
    report = Report()
    await measure_speed(targets, report, model="m", num_rounds=3, seed=1, say=lambda text: None)
    ours, a, b, installed = (target.asked for target in targets.values())
    assert ours == a == b and len(ours) == 15 and len(installed) == 2
    assert ours[3] == ours[4] and ours[3] != ours[8]  # a prompt, again, and the next round's
    joins, leaves = report.numbers[-2:]
    assert joins.is_met and not leaves.is_met and leaves.value == 20


async def test_while_one_is_measured_the_others_do_not_run() -> None:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "import time; time.sleep(60)")

    def state() -> str:
        return Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]

    other = HttpTarget("other", None, pid=process.pid)  # type: ignore[arg-type]
    measured = HttpTarget("measured", None)  # type: ignore[arg-type]
    try:
        with alone(measured, [measured, other]):
            while state() != "T":
                await asyncio.sleep(0)
        while state() == "T":
            await asyncio.sleep(0)
    finally:
        process.kill()
        await process.wait()


def test_what_an_event_costs_is_the_time_beyond_settled_steps_hiccups_left_out() -> None:
    one, hiccup = ([3.0, 2.0], [2.0, 2.0, 9.0]), ([3.0, 80.0], [2.0, 2.0, 2.0])
    assert excess([one, one, hiccup]) == pytest.approx(0.5)
    assert excess([([2.0, 2.0], [2.0, 2.0])]) == 0


def test_a_rival_sees_nothing_of_our_package() -> None:
    for blas in Blas:
        made = command(RIVALS["vllm-mlx"], "m", 1234, blas, "/env/bin/python")
        assert made[:2] == ["/env/bin/python", "-I"] and made[-1] == "--continuous-batching" and "m" in made
        assert ("rival.py" in " ".join(made)) is (blas is not Blas.INSTALLED)


def test_the_launcher_runs_a_module_on_our_openblas(tmp_path: Path) -> None:
    """With the standard library's own `calendar` as the rival."""
    made = [sys.executable, "-I", command(RIVALS["mlx-lm"], "m", 1, Blas.OPENBLAS)[2], "openblas", "calendar", "2026"]
    found = subprocess.run(made, capture_output=True, text=True, timeout=120, check=False)
    if "No OpenBLAS" in found.stderr:  # a machine that has none is told so, and nothing is measured
        assert found.returncode == 1
    else:
        assert "January" in found.stdout and "few-row kernels are switched off" in found.stderr


def test_interpreters_are_named_for_one_or_for_all() -> None:
    assert interpreters([], ["mlx-lm"]) == {"mlx-lm": sys.executable}
    assert interpreters(["vllm-mlx=/v", "/all"], ["vllm-mlx", "mlx-vlm"]) == {"vllm-mlx": "/v", "mlx-vlm": "/all"}
    with pytest.raises(SettingsError, match="add --rival"):
        interpreters(["vllm-mlx=/v"], ["mlx-vlm"])


def test_a_rival_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(SettingsError, match="cannot be run"):
        version_of(RIVALS["mlx-lm"], "/nonexistent/python")
    assert version_of(RIVALS["mlx-lm"], sys.executable)[0].isdigit()


@pytest.mark.parametrize("argv", (["--speed", "--numbers"], ["--numbers", "--rival", "mlx-vlm"],
                                  ["--rival", "mlx-lm", "--rival-python", "mlx-vlm=/p"]))  # fmt: skip
def test_sides_that_do_not_fit_are_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        parse(argv)
