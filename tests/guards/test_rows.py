"""How many rows each runtime mode allows, as concurrency comes and goes."""

from __future__ import annotations

import pytest

from vllm_mlx.guards.rows import RowGuard


def test_simple_is_one_row_and_batched_is_all_whatever_comes() -> None:
    assert [RowGuard("simple", 8).judge(n, 0.0) for n in (0, 1, 20)] == [1, 1, 1]
    assert [RowGuard("batched", 8).judge(n, 0.0) for n in (0, 1, 20)] == [8, 8, 8]


def test_auto_widens_at_the_threshold_at_once_and_narrows_after_a_quiet_while() -> None:
    rows = RowGuard("auto", 8, threshold=3, quiet_s=60)
    assert rows.limit == 1
    assert [rows.judge(n, t) for n, t in ((1, 0), (2, 1), (3, 2), (1, 3), (2, 62), (2, 63), (3, 64))] == [
        1, 1, 8, 8, 8, 1, 8,
    ]  # fmt: skip
    assert rows.report()["times_widened"] == 2 and rows.report()["peak_concurrency"] == 3


def test_serialized_wins_over_every_mode() -> None:
    is_serialized = [True]
    for mode in ("batched", "auto", "simple"):
        rows = RowGuard(mode, 8, is_serialized=lambda: is_serialized[0])
        assert rows.judge(5, 0.0) == 1
    is_serialized[0] = False
    rows = RowGuard("batched", 8, is_serialized=lambda: is_serialized[0])
    assert rows.judge(5, 0.0) == 8


def test_a_limit_of_one_stays_one_in_every_mode() -> None:
    assert {RowGuard(mode, 1).judge(9, 0.0) for mode in ("simple", "batched", "auto")} == {1}


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="runtime mode"):
        RowGuard("turbo", 8)
