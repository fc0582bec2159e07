from __future__ import annotations

from vllm_mlx.models.memory import available_memory_bytes


def test_on_an_accelerator_its_own_memory_counts() -> None:
    info = {"memory_size": 64 << 30, "max_recommended_working_set_size": 48 << 30}
    assert available_memory_bytes(info, has_gpu=True) == 48 << 30
    assert available_memory_bytes({"total_memory": 80 << 30}, has_gpu=True) == 80 << 30


def test_on_the_cpu_it_is_what_the_system_has_left() -> None:
    available = available_memory_bytes({}, has_gpu=False)
    assert 64 << 20 < available < 1 << 50


def test_an_accelerator_that_says_nothing_falls_back_on_the_system() -> None:
    assert available_memory_bytes({}, has_gpu=True) > 64 << 20
