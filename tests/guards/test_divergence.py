"""From pairs of answers to a verdict; no engine here."""

from __future__ import annotations

import pytest

from vllm_mlx.guards.divergence import NUM_KEPT, DivergenceGuard, Verdict, compare

SAME = compare("same", [1, 2, 3, 4], [1, 2, 3, 4], rows=2)
HALF = compare("half", [1, 2, 3, 4], [1, 2, 8, 9], rows=2)


@pytest.mark.parametrize(
    ("batched", "alone", "agreement", "first"),
    [
        ([1, 2, 3, 4], [1, 2, 3, 4], 1.0, None),
        ([1, 2, 3, 4], [1, 9, 3, 4], 0.75, 1),
        ([1, 2], [1, 2, 3, 4], 0.5, 2),
        ([1, 2, 3, 4], [], 0.0, 0),
        ([], [], 1.0, None),
    ],
)
def test_agreement_is_by_position_and_missing_tokens_differ(batched, alone, agreement, first) -> None:
    comparison = compare("r", batched, alone, rows=4)
    assert (comparison.agreement, comparison.first_difference) == (agreement, first)


def test_no_probe_is_unknown_and_agreement_is_a_pass() -> None:
    guard = DivergenceGuard()
    assert guard.verdict is Verdict.UNKNOWN and guard.agreement is None
    guard.observe(SAME)
    assert guard.verdict is Verdict.PASS and guard.agreement == 1.0


def test_one_slip_among_many_good_probes_is_no_divergence_when_the_mean_holds() -> None:
    guard = DivergenceGuard(threshold=0.9)
    for _ in range(NUM_KEPT - 1):
        guard.observe(SAME)
    guard.observe(HALF)
    assert guard.agreement == pytest.approx(0.9375) and guard.verdict is Verdict.PASS


def test_only_the_action_serialize_serializes() -> None:
    for action, serializes in (("warn", False), ("serialize", True)):
        guard = DivergenceGuard(action=action)
        guard.observe(HALF)
        assert guard.verdict is Verdict.WARNING and guard.serializes is serializes


def test_recovery_takes_several_good_probes_in_a_row() -> None:
    guard = DivergenceGuard(action="serialize", num_good_to_recover=3)
    for probe in (HALF, SAME, SAME, HALF, SAME, SAME):
        guard.observe(probe)
        assert guard.serializes
    guard.observe(SAME)
    assert not guard.serializes and guard.verdict is Verdict.PASS and guard.agreement == 1.0


def test_a_failed_probe_changes_neither_verdict() -> None:
    guard = DivergenceGuard(action="serialize")
    guard.failed("boom")
    assert guard.verdict is Verdict.UNKNOWN and not guard.serializes
    guard.observe(HALF)
    for _ in range(5):
        guard.failed("boom")
        guard.interrupted()
    assert guard.serializes and guard.report()["failed_probes"] == 6 and guard.report()["last_failure"] == "boom"


def test_the_report_says_where_the_last_answer_differed() -> None:
    guard = DivergenceGuard()
    guard.observe(HALF)
    report = guard.report()
    assert report["last_first_difference"] == 2 and report["last_token_agreement"] == 0.5
    assert report["status"] == "warning" and report["sample_count"] == 1 and report["serialize_active"] is False
