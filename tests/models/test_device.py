"""Memory goes back to the system when the engine is idle, not more often than asked."""

from __future__ import annotations

import pytest

from vllm_mlx.models import device


def test_memory_is_released_when_idle_but_not_at_every_idle_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    released: list[float] = []
    times = [0.0]
    monkeypatch.setattr(device, "release_cached", lambda: released.append(times[-1]))
    idle = device.IdleRelease(interval_s=30, clock=lambda: times[-1])
    for moment in (1.0, 29.0, 31.0, 40.0, 61.0):
        times.append(moment)
        assert idle() is False
    assert released == [31.0, 61.0]


def test_releasing_twice_is_harmless() -> None:
    device.release_cached()
    device.release_cached()
    assert device.report().cached_bytes == 0
