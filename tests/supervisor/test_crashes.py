"""How often a process may crash before its front gives up."""

from __future__ import annotations

from vllm_mlx.supervisor.crashes import CrashLog, cause_of


def test_three_crashes_in_a_minute_are_too_many() -> None:
    log = CrashLog()
    assert log.record(0, "a") and log.record(30, "b") and not log.record(59, "c")
    assert log.num_crashes == 3 and log.last_cause == "c"


def test_crashes_that_are_further_apart_go_on_for_ever() -> None:
    log = CrashLog()
    assert all(log.record(31.0 * i, "again") for i in range(100))


def test_causes_are_said_in_words() -> None:
    assert cause_of(-9) == "it was ended by SIGKILL"
    assert cause_of(-6) == "it was ended by SIGABRT"
    assert cause_of(3) == "it ended with exit code 3"
    assert cause_of(-200) == "it was ended by signal 200"
