"""`--plot`: a picture that holds what was measured, and a sentence where none can be drawn."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.bench import agent, plot
from vllm_mlx.bench.main import parse
from vllm_mlx.bench.measure import Trace, summarize
from vllm_mlx.bench.report import Number, Report, Run
from vllm_mlx.errors import SettingsError


def run(target: str, workload: str, round: int, tokens: int) -> Run:
    return Run(target, workload, 1, round, summarize([Trace(0.0, 2.0, [0.5, 2.0], num_completion_tokens=tokens)]))



def test_bars_are_medians_with_a_panel_for_the_promises(tmp_path: Path) -> None:
    sides = (("ours", 400), ("theirs", 200))
    runs = [run(target, "short", number, tokens + number) for target, tokens in sides for number in range(3)]
    numbers = [
        Number("a ratio", 2.0, 1.8, at_least=True, unit="x"),
        Number("a time", 90, 60, at_least=False, unit=" ms"),
        Number("only shown", 1.0, None, at_least=True),
    ]
    path = tmp_path / "bench.svg"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MPLCONFIGDIR", str(tmp_path))
        import matplotlib

        matplotlib.rcParams["svg.fonttype"] = "none"  # text as text, so that it can be read here
        plot.draw(str(path), runs, numbers, Report.title())
    text = path.read_text()
    for part in ("ours", "theirs", "200.5", "100.5", "short, 1 stream", "first token", "2x", "90 ms", "a ratio"):
        assert part in text, part
    assert "only shown" not in text and plot.MISSED.lower() in text.lower()


def test_a_png_is_a_png_and_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    plot.draw(str(tmp_path / "a.png"), [run("ours", "short", 0, 4)], [], "title")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    plot.draw(str(tmp_path / "b.png"), [], [], "title")
    assert not (tmp_path / "b.png").exists()


@pytest.mark.parametrize(("path", "said"), [("a.jpeg", ".png"), ("/nonexistent/a.png", "no such folder")])
def test_what_cannot_be_drawn_is_refused_before_anything_is_measured(path: str, said: str) -> None:
    for parse_any in (parse, agent.parse):
        with pytest.raises(SettingsError, match=said):
            parse_any(["--plot", path])


def test_without_matplotlib_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="pip install matplotlib"):
        parse(["--plot", "a.png"])


def test_an_agents_day_is_judged_by_its_numbers() -> None:
    good = agent.Row("gaps", "p99", 300.0, "of 9", 500, unit=" ms")
    bad = agent.Row("restore", "30m", 8.0, "1 s", 10, at_least=True, unit=" times")
    lost = agent.Row("sessions", "mlx-lm", None, "fails: no answer")
    assert good.is_met and good.verdict == "<= 500 ms ✓" and good.value == "300 ms (of 9)"
    assert not bad.is_met and bad.verdict == ">= 10 times ✗"
    assert lost.is_met and lost.value == "fails: no answer" and lost.verdict == ""
