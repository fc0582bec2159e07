"""What is chosen on machines whose best settings are known."""

from __future__ import annotations

import random

import pytest

from tests.tune.fakes import FakeMachine
from vllm_mlx.tune.search import Knobs, Outcome, choose_chunk, choose_guessing, choose_rows, search

DEFAULTS = Knobs(512, 256, "auto")


def run(machine: FakeMachine, *, can_guess: bool = True) -> Outcome:
    return search(machine, DEFAULTS, num_rounds=3, can_guess=can_guess, say=lambda text: None)


def test_a_machine_that_likes_the_defaults_keeps_them() -> None:
    outcome = run(FakeMachine())
    assert outcome.after == DEFAULTS and all(c.gain == pytest.approx(1) for c in outcome.comparisons)


def test_the_fastest_chunk_is_taken_if_it_is_worth_it() -> None:
    fast = {128: 1.4, 256: 0.9, 512: 1.0, 1024: 0.7, 2048: 0.8}
    assert choose_chunk(FakeMachine(prefill=fast.__getitem__), DEFAULTS, 3, lambda text: None) == 1024
    assert choose_chunk(FakeMachine(prefill=lambda chunk: 1 - chunk / 1e6), DEFAULTS, 3, lambda text: None) == 512


def test_a_default_that_is_no_candidate_is_compared_all_the_same() -> None:
    machine = FakeMachine(prefill=lambda chunk: 0.5 if chunk == 300 else 1.0)
    assert choose_chunk(machine, Knobs(300, 256, "auto"), 3, lambda text: None) == 300


def test_no_more_rows_than_bring_something() -> None:
    machine = FakeMachine(rate=lambda rows: min(rows, 24) * 10.0)
    assert choose_rows(machine, DEFAULTS, 3, lambda text: None) == 32
    assert choose_rows(FakeMachine(rate=lambda rows: 100 / rows), DEFAULTS, 3, lambda text: None) == 1


def test_where_the_rate_still_grows_the_default_stays() -> None:
    """The largest number that was tried, or that memory allowed, says nothing of what lies beyond."""
    assert choose_rows(FakeMachine(), DEFAULTS, 3, lambda text: None) == 256
    assert choose_rows(FakeMachine(), Knobs(512, 48, "auto"), 3, lambda text: None) == 48


@pytest.mark.parametrize(
    ("copying", "writing", "chosen"), [(3.0, 1.0, "auto"), (3.0, 0.9, "off"), (1.0, 1.0, "off"), (1.5, 0.98, "auto")]
)
def test_guessing_must_help_copies_and_not_hurt_new_text(copying: float, writing: float, chosen: str) -> None:
    machine = FakeMachine(copying=copying, writing=writing)
    assert choose_guessing(machine, DEFAULTS, 3, lambda text: None) == chosen


def test_a_model_that_cannot_guess_is_not_asked_to() -> None:
    assert run(FakeMachine(copying=1.0, writing=0.5), can_guess=False).after.speculation == "auto"


def test_a_machine_with_busy_moments_does_not_mislead() -> None:
    """Every fourth measurement takes three times as long, whoever is measured then."""
    rng = random.Random(3)
    machine = FakeMachine(busy=lambda number: 3.0 if rng.random() < 0.1 else 1.0,
                          prefill=lambda chunk: 1.0 if chunk != 1024 else 0.5)  # fmt: skip
    outcome = search(machine, DEFAULTS, num_rounds=9, can_guess=True, say=lambda text: None)
    assert outcome.after.prefill_step_size == 1024


def test_what_turns_out_slower_in_the_end_is_not_kept() -> None:
    """Few rows looked best by their rate, but a crowd takes longer with them."""

    class Misleading(FakeMachine):
        def crowd_s(self, knobs: Knobs, num_requests: int) -> float:
            return 2.0 if knobs.max_num_seqs < 256 else 1.0

    said: list[str] = []
    machine = Misleading(rate=lambda rows: min(rows, 8) * 10.0)
    outcome = search(machine, DEFAULTS, num_rounds=3, can_guess=True, say=said.append)
    assert outcome.after.max_num_seqs == 256 and any("max_num_seqs 8 was slower" in line for line in said)
