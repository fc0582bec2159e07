"""Levels with hysteresis, and what each action does to new requests; readings are made up."""

from __future__ import annotations

import os

import pytest

from vllm_mlx.errors import ModelLoadError
from vllm_mlx.guards.memory import Level, MemoryGuard, MemoryMonitor, MemorySample, check_weights
from vllm_mlx.guards.process_memory import capacity_bytes, process_bytes

GIB = 2**30


def sample(percent: float, *, reclaimable_bytes: int = 0) -> MemorySample:
    return MemorySample(int(percent / 100 * 10 * GIB), 10 * GIB, reclaimable_bytes=reclaimable_bytes)


def levels(guard: MemoryGuard, *percents: float) -> list[str]:
    return [guard.observe(sample(p)).value for p in percents]


def test_a_level_is_entered_at_its_threshold_and_left_below_it() -> None:
    guard = MemoryGuard(warn_percent=70, limit_percent=85)
    assert levels(guard, 69, 70, 68, 66, 69, 85, 83, 81, 66) == [
        "normal", "elevated", "elevated", "normal", "normal", "critical", "critical", "elevated", "normal",
    ]  # fmt: skip


def test_the_fuller_of_host_and_device_counts() -> None:
    guard = MemoryGuard()
    assert guard.observe(MemorySample(1 * GIB, 100 * GIB, 9 * GIB, 10 * GIB)) is Level.CRITICAL
    assert guard.observe(MemorySample(1 * GIB, 100 * GIB, 1 * GIB, 10 * GIB)) is Level.NORMAL
    assert guard.observe(MemorySample(90 * GIB, 100 * GIB, 1 * GIB, 10 * GIB)) is Level.CRITICAL


@pytest.mark.parametrize(
    ("action", "rejects", "context"),
    [("warn", False, None), ("reduce-context", False, 2048), ("reject-new", True, None)],
)
def test_the_action_is_taken_at_critical_only(action, rejects, context) -> None:
    guard = MemoryGuard(action=action)
    guard.observe(sample(75))
    assert not guard.rejects_new and guard.context_tokens(4096) is None
    guard.observe(sample(90))
    assert guard.rejects_new is rejects and guard.context_tokens(4096) == context
    guard.observe(sample(83))  # under the limit, but not yet far enough
    assert guard.rejects_new is rejects and guard.context_tokens(4096) == context
    guard.observe(sample(50))
    assert not guard.rejects_new and guard.context_tokens(4096) is None


def test_the_reason_names_numbers_and_flag() -> None:
    guard = MemoryGuard()
    assert guard.reason == ""
    guard.observe(sample(90))
    assert "90 % full" in guard.reason and "9.00 GiB" in guard.reason and "--memory-limit-threshold 85" in guard.reason


def test_idle_cache_is_dropped_from_the_warning_on_but_no_more_than_is_needed() -> None:
    asked: list[int] = []
    readings = [sample(60, reclaimable_bytes=5 * GIB), sample(72, reclaimable_bytes=5 * GIB),
                sample(72, reclaimable_bytes=GIB // 10), sample(72)]  # fmt: skip
    monitor = MemoryMonitor(MemoryGuard(), lambda: readings.pop(0), asked.append, interval_s=5)
    for now in (0, 5, 10, 15):
        monitor.tick(now)
    assert asked == [pytest.approx(0.5 * GIB, rel=0.01), GIB // 10]  # down to 67 %, then all there is, then nothing


def test_a_tick_within_the_interval_reads_nothing() -> None:
    readings = [sample(10), sample(90)]
    monitor = MemoryMonitor(MemoryGuard(), lambda: readings.pop(0), interval_s=5)
    assert [monitor.tick(t).value for t in (0, 1, 4.9, 5)] == ["normal", "normal", "normal", "critical"]


def test_the_trend_compares_the_ends_of_the_last_minute() -> None:
    guard = MemoryGuard()
    assert guard.trend == "unknown"
    levels(guard, 10, 11)
    assert guard.trend == "steady"
    levels(guard, 20)
    assert guard.trend == "rising"
    levels(guard, *[20] * 12, 5)
    assert guard.trend == "falling"


def test_the_report_says_what_was_measured_and_what_follows() -> None:
    guard = MemoryGuard(action="reduce-context")
    assert guard.report()["pressure"] == "unknown"
    guard.observe(sample(90))
    report = guard.report()
    assert report["pressure"] == "critical" and report["utilization_pct"] == 90.0
    assert report["context_factor"] == 0.5 and report["rejects_new"] is False and report["times_critical"] == 1


def test_weights_that_pass_the_limit_alone_are_a_start_up_error_with_numbers() -> None:
    check_weights(8 * GIB, 10 * GIB, 85)
    with pytest.raises(ModelLoadError, match=r"take 9\.0 GiB.*85 %.*10\.0 GiB.*8\.5 GiB"):
        check_weights(9 * GIB, 10 * GIB, 85)


def test_the_process_is_measured_and_grows_with_what_it_holds() -> None:
    before = process_bytes()
    held = bytearray(os.urandom(1 << 20)) * 64
    assert process_bytes() - before > 48 << 20
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert before < capacity_bytes() <= total and len(held)
