"""A budget divided among models."""

from __future__ import annotations

from dataclasses import dataclass

from vllm_mlx.fleet.shares import MIN_KV_BYTES, divide

GIB = 1 << 30


@dataclass(frozen=True)
class Weighed:
    weights_bytes: int
    num_parameters: int = 10**12


def test_models_that_fit_together_share_what_is_left() -> None:
    shares = divide(100 * GIB, [Weighed(40 * GIB), Weighed(20 * GIB)], is_cpu=False)
    assert [share.weights_bytes for share in shares] == [40 * GIB, 20 * GIB]
    assert [share.kv_bytes for share in shares] == [16 * GIB, 16 * GIB]
    assert sum(share.cost_bytes for share in shares) <= 100 * GIB


def test_models_that_do_not_fit_together_each_get_a_part_of_what_their_own_weights_leave() -> None:
    shares = divide(100 * GIB, [Weighed(80 * GIB), Weighed(60 * GIB)], is_cpu=False)
    assert all(share.cost_bytes <= 100 * GIB for share in shares)
    assert shares[0].kv_bytes < shares[1].kv_bytes


def test_models_beside_the_chat_have_their_part_before_it_is_divided() -> None:
    (share,) = divide(100 * GIB, [Weighed(40 * GIB)], is_cpu=False, beside_bytes=10 * GIB)
    assert share.kv_bytes == 40 * GIB
    (tight,) = divide(100 * GIB, [Weighed(40 * GIB)], is_cpu=False, beside_bytes=80 * GIB)
    assert tight.kv_bytes == 48 * GIB, "they take turns"


def test_a_model_that_can_never_fit_says_what_it_would_need() -> None:
    (share,) = divide(10 * GIB, [Weighed(12 * GIB)], is_cpu=False)
    assert share.weights_bytes == 12 * GIB and share.kv_bytes == MIN_KV_BYTES


def test_on_a_cpu_small_weights_are_counted_as_the_float32_they_become() -> None:
    small, large = divide(32 * GIB, [Weighed(GIB, GIB), Weighed(3 * GIB, 3 * GIB)], is_cpu=True)
    assert small.weights_bytes == 4 * GIB
    assert large.weights_bytes == 3 * GIB, "12 GiB of float32 would take most of an even part"
