"""The agent benchmark's arithmetic and its command line; the servers are measured by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.bench.agent import Bill, Reader, Session, parse
from vllm_mlx.bench.agent_models import build_kind
from vllm_mlx.bench.measure import Trace
from vllm_mlx.errors import SettingsError


def trace(prompt: int, cached: int, completion: int = 32) -> Trace:
    made = Trace(0.0, 1.0, stamps=[0.5])
    made.num_prompt_tokens, made.num_cached_tokens, made.num_completion_tokens = prompt, cached, completion
    return made


def test_a_bill_is_what_was_computed_over_what_was_new() -> None:
    bill = Bill()
    bill.add(trace(2000, 0), 2000)
    bill.add(trace(2632, 2016), 601)
    assert bill.unavoidable == 2601 and bill.computed == 2000 + 2632 - 2016
    assert bill.ratio == pytest.approx(2616 / 2601)


def test_a_session_has_about_the_tokens_that_were_asked_for(tmp_path: Path) -> None:
    model = str(build_kind(tmp_path, "attention"))
    session = Session(model, 1, 30, 20_000)
    messages = [*session.messages, *({"role": "user", "content": turn} for turn in session.turns)]
    assert 18_000 < len(Reader(model).tokens(messages)) + 30 * 32 < 26_000


@pytest.mark.parametrize("argv", [["--parts", "lunch"], ["--kinds", "attention,none"]])
def test_an_unknown_part_or_kind_is_a_sentence(argv: list[str]) -> None:
    with pytest.raises(SettingsError, match="does not know"):
        parse(argv)
