"""The agent benchmark's arithmetic and its command line; the servers are measured by hand."""

from __future__ import annotations

import pytest

from vllm_mlx.bench.agent import Bill, Session, parse
from vllm_mlx.bench.measure import Trace
from vllm_mlx.errors import SettingsError


def trace(prompt: int, cached: int, completion: int = 32) -> Trace:
    made = Trace(0.0, 1.0, stamps=[0.5])
    made.num_prompt_tokens, made.num_cached_tokens, made.num_completion_tokens = prompt, cached, completion
    return made


def test_unavoidable_is_what_a_turn_adds_to_the_prompt_and_answer_before() -> None:
    bill = Bill()
    bill.add(trace(2000, 0))
    bill.add(trace(2632, 2016))
    assert bill.unavoidable == 2000 + 2632 - 2032 and bill.computed == 2000 + 2632 - 2016
    assert bill.ratio == pytest.approx(2616 / 2600)


def test_a_server_that_computes_everything_again_pays_for_it() -> None:
    bill = Bill()
    for prompt in (2000, 2632, 3264):
        bill.add(trace(prompt, 0))
    assert bill.ratio > 2


def test_a_session_has_about_the_tokens_that_were_asked_for() -> None:
    session = Session(1, 30, 20_000)
    words = sum(len(turn.split()) for turn in session.turns) + len(session.messages[0]["content"].split())
    assert len(session.turns) == 30 and 17_000 < words * 1.45 + 30 * 32 < 22_000


@pytest.mark.parametrize("argv", [["--parts", "lunch"], ["--kinds", "attention,none"]])
def test_an_unknown_part_or_kind_is_a_sentence(argv: list[str]) -> None:
    with pytest.raises(SettingsError, match="does not know"):
        parse(argv)
