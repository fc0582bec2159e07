"""Arithmetic on logits against plain numpy, and the fast CPU paths against their plain twins."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from vllm_mlx.engine import logits as lg


def values(shape: tuple[int, ...], seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


def test_the_fast_exponential_is_the_exponential() -> None:
    x = -np.abs(np.concatenate([values((60_000,), scale=20.0), np.linspace(-87, 0, 30_000, dtype=np.float32)]))
    fast = np.array(lg._exp_by_bits(mx.array(x))).astype(np.float64)
    exact = np.exp(x.astype(np.float64))
    normal = x > -86
    assert np.max(np.abs(fast[normal] / exact[normal] - 1)) < 1e-5
    assert np.array(lg._exp_by_bits(mx.array([0.0]))).item() == 1.0


def test_the_fast_exponential_ends_in_exact_zeros() -> None:
    x = mx.array([-88.5, -100.0, -1e6, lg.BANNED, -float("inf")])
    assert np.array(lg._exp_by_bits(x)).tolist() == [0.0] * 5


def test_the_fast_exponential_is_monotone() -> None:
    """Thresholds compare weights where the logits were meant: an order reversed would admit a banned token."""
    x = np.sort(-np.abs(values((50_000,), seed=1, scale=10.0)))
    fast = np.array(lg._exp_by_bits(mx.array(x)))
    # neighbours closer than a rounding error may swap, but only by one
    assert np.all(np.diff(fast) >= -2e-7 * fast[1:])


@pytest.mark.parametrize("vocab", [5, 31, 64, 1000, 4096, 5003])
@pytest.mark.parametrize("num", [1, 3, 64, 512])
def test_the_preselected_top_is_that_of_a_whole_sort(vocab: int, num: int) -> None:
    x = values((3, vocab), seed=vocab)
    top, ids = lg.top_sorted(mx.array(x), num)
    expected = -np.sort(-x, axis=-1)[:, :num]
    assert np.array_equal(np.array(top), expected)
    assert np.array_equal(np.take_along_axis(x, np.array(ids).astype(np.int64), axis=-1), expected)


def test_tied_tokens_are_each_found_once() -> None:
    x = np.zeros((2, 5000), dtype=np.float32)
    _, ids = lg.top_sorted(mx.array(x), 64)
    assert all(len(set(row)) == 64 and max(row) < 5000 for row in np.array(ids).tolist())


@pytest.mark.parametrize("vocab", [7, 64, 1000, 1024])
def test_row_reductions(vocab: int) -> None:
    x = values((4, vocab))
    assert np.array_equal(np.array(lg.row_max(mx.array(x)))[:, 0], x.max(-1))
    assert np.allclose(np.array(lg.row_sum(mx.array(x)))[:, 0], x.astype(np.float64).sum(-1), atol=1e-3)


@pytest.mark.parametrize("vocab", [7, 8, 33, 100, 1000])
def test_bitmasks_ban_exactly_the_cleared_bits(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    x = values((4, vocab))
    masks: list[np.ndarray | None] = [rng.integers(0, 2**32, (vocab + 31) // 32).astype(np.uint32) for _ in range(3)]
    masks.insert(1, None)
    out = np.array(lg.apply_bitmasks(mx.array(x), masks))
    for row, mask in enumerate(masks):
        for token in range(vocab):
            is_set = mask is None or bool(int(mask[token // 32]) >> (token % 32) & 1)
            assert (out[row, token] == x[row, token]) if is_set else (out[row, token] < lg.BANNED_BELOW)


def test_values_are_added_where_they_belong_and_add_up() -> None:
    x = values((2, 10))
    out = np.array(lg.add_at(mx.array(x), [0, 1, 1], [3, 4, 4], [1.5, -2.0, -1.0]))
    expected = x.copy()
    expected[0, 3] += 1.5
    expected[1, 4] -= 3.0
    assert np.allclose(out, expected)
    unchanged = mx.array(x)
    assert lg.add_at(unchanged, [], [], []) is unchanged


def test_penalties_are_openais_and_keskars() -> None:
    x = np.array([[2.0, -2.0, 1.0, -1.0, -np.inf]], dtype=np.float32)
    counts = np.array([[3.0, 0.0, 1.0, 0.0, 0.0]], dtype=np.float32)
    unrepeated = np.array([[0.5, 0.5, 1.0, 1.0, 0.5]], dtype=np.float32)  # repetition penalty 2 on the first two
    out = np.array(
        lg.repetition_and_additive_penalties(
            mx.array(x), mx.array(counts), mx.array(unrepeated), mx.array([[0.25]]), mx.array([[0.1]])
        )
    )
    assert out[0, :4].tolist() == pytest.approx([1.0 - 0.3 - 0.25, -4.0, 1.0 - 0.1 - 0.25, -1.0])
    assert out[0, 4] == -np.inf


@pytest.mark.parametrize("vocab", [50, 40_000])
def test_logprobs_are_log_softmax(vocab: int) -> None:
    x = values((3, vocab))
    ids = mx.array([0, 7, 49], dtype=mx.uint32)
    chosen, top, top_ids = (np.array(a) for a in lg.logprobs_at(mx.array(x), ids, 5))
    z = x.astype(np.float64)
    expected = z - np.log(np.exp(z).sum(-1, keepdims=True))
    assert np.allclose(chosen, expected[np.arange(3), np.array(ids)], atol=1e-4)
    order = np.argsort(-z, axis=-1)[:, :5]
    assert np.array_equal(top_ids, order)
    assert np.allclose(top, np.take_along_axis(expected, order, axis=-1), atol=1e-4)
