"""Memory goes back to the system when the engine has been idle for a while."""

from __future__ import annotations

import pytest

from vllm_mlx.models import device


def test_memory_is_released_once_when_nothing_was_done_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[float] = []
    now, steps = [0.0], [0]
    monkeypatch.setattr(device, "release_cached", lambda: released.append(now[0]))
    idle = device.IdleRelease(lambda: steps[0], after_s=300, clock=lambda: now[0])
    # Work until 100; idle moments right after it and every half minute.
    moments = [(0, 0), (100, 50), (130, 50), (390, 50), (400, 50), (430, 50), (800, 50)]
    moments += [(801, 60), (1100, 60), (1101, 60)]
    for moment, done in moments:
        now[0], steps[0] = moment, done
        assert idle() is False
    assert released == [400, 1101]


def test_releasing_twice_is_harmless() -> None:
    device.release_cached()
    device.release_cached()
    assert device.report().cached_bytes == 0
