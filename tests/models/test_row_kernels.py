"""Our CPU kernels against MLX's own operations."""

from __future__ import annotations

import sys

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.models import huge_pages, row_kernels

needs_kernels = pytest.mark.skipif(
    sys.platform != "linux" or mx.default_device().type != mx.cpu, reason="other backends have kernels of their own"
)


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)) * scale


@needs_kernels
def test_the_kernels_are_there():
    assert row_kernels.are_available()


@needs_kernels
@settings(max_examples=80, deadline=None)
@given(
    batch=st.integers(1, 3), kv_heads=st.integers(1, 3), group=st.integers(1, 4), length=st.integers(1, 300),
    before=st.integers(0, 700), kind=st.sampled_from(["none", "causal", "bool", "heads", "added"]),
    seed=st.integers(0, 1000), spare=st.integers(0, 3),
)  # fmt: skip
def test_attention_is_mlx_s(batch, kv_heads, group, length, before, kind, seed, spare):
    span, dim = before + length, 16
    q = random(batch, length, kv_heads * group, dim, seed=seed).swapaxes(1, 2)
    k = random(batch, kv_heads, span + spare, dim, seed=seed + 1)[:, :, :span]
    v = random(batch, kv_heads, span + spare, dim, seed=seed + 2)[:, :, :span]
    mask: mx.array | str | None = None if kind == "none" else "causal"
    if kind in ("bool", "heads"):
        heads = kv_heads * group if kind == "heads" else 1
        mask = (random(batch, heads, length, span, seed=seed + 3) > 0) | (mx.arange(span) == 0)
    elif kind == "added":
        mask = random(length, span, seed=seed + 3)
    ours = row_kernels.attention(q, k, v, scale=0.3, mask=mask)
    mlx_s = row_kernels._mlx_attention(q, k, v, scale=0.3, mask=mask)
    assert ours.shape == mlx_s.shape
    assert mx.allclose(ours, mlx_s, rtol=1e-4, atol=1e-5)


@needs_kernels
def test_attention_goes_through_blocks_that_leave_out_later_keys(monkeypatch):
    monkeypatch.setattr(row_kernels, "_MOST_SCORES", 4 * 64 * 400)
    monkeypatch.setattr(row_kernels, "_FEWEST_ROWS", 1)
    q, k, v = random(2, 4, 300, 16), random(2, 2, 400, 16, seed=1), random(2, 2, 400, 16, seed=2)
    each = (random(2, 4, 300, 400, seed=3) > 0) | (mx.arange(400) == 0)
    for mask in (None, "causal", each, each[:1, :1], each[:, :, :1]):
        ours = row_kernels.attention(q, k, v, scale=0.3, mask=mask)
        assert mx.allclose(ours, row_kernels._mlx_attention(q, k, v, scale=0.3, mask=mask), rtol=1e-4, atol=1e-5)


@needs_kernels
def test_a_decode_row_does_not_depend_on_its_neighbours():
    q, k, v = random(8, 4, 1, 16), random(8, 2, 700, 16, seed=1), random(8, 2, 700, 16, seed=2)
    lengths = mx.array([3, 50, 700, 699, 120, 121, 128, 256])
    mask = (mx.arange(700) < lengths[:, None])[:, None, None]
    together = row_kernels.attention(q, k, v, scale=0.25, mask=mask)
    for i in (0, 2, 7):
        own = slice(i, i + 1)
        alone = row_kernels.attention(q[own], k[own], v[own], scale=0.25, mask=mask[own])
        assert mx.array_equal(alone[0], together[i])


@needs_kernels
def test_numbers_that_are_none_stay_visible_as_such():
    x = random(4, 512)
    x[1, 300] = mx.nan
    probabilities = row_kernels.softmax(x)
    assert mx.isnan(probabilities[1]).all() and not mx.isnan(probabilities[0]).any()


@needs_kernels
@pytest.mark.parametrize("shape", [(7, 300), (2, 5, 512), (1, 1024)])
def test_softmax_exp_and_swiglu_are_mlx_s(shape):
    x, up = random(*shape, scale=4.0), random(*shape, seed=1)
    assert mx.allclose(row_kernels.softmax(x), mx.softmax(x, axis=-1), rtol=1e-4, atol=1e-9)
    assert mx.allclose(row_kernels.exp(x), mx.exp(x), rtol=1e-5)
    assert mx.allclose(row_kernels.swiglu(x, up), row_kernels._mlx_swiglu(x, up), rtol=1e-5, atol=1e-6)


@needs_kernels
@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 4), length=st.integers(1, 70), half=st.integers(1, 40),
    spare=st.integers(0, 20), where=st.sampled_from(["int", "one", "each"]), offset=st.integers(0, 20_000),
    has_freqs=st.booleans(), scale=st.sampled_from([1.0, 0.25]),
)  # fmt: skip
def test_rotary_positions_are_mlx_s(batch, heads, length, half, spare, where, offset, has_freqs, scale):
    x = random(batch, length, heads, 2 * half + spare).swapaxes(1, 2)
    places = {"int": offset, "one": mx.array(offset), "each": mx.array([offset + 11 * i for i in range(batch)])}
    freqs = mx.arange(1, half + 1) * 1.5 if has_freqs else None
    given_ = {"traditional": False, "base": None if has_freqs else 1e6, "scale": scale, "offset": places[where]}
    ours = row_kernels.rope(x, 2 * half, freqs=freqs, **given_)
    # MLX's frequencies and sines lose digits with the angle; that ours are exact is seen in tests/test_blas.py.
    far = 1e-5 + 1e-6 * offset
    assert mx.allclose(ours, row_kernels._mlx_rope(x, 2 * half, freqs=freqs, **given_), rtol=1e-4, atol=far)


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1, 512), (3, 5, 100), (2, 4, 1, 7), (40, 1)])
def test_rms_norm_is_mlx_s(shape):
    x, weight = random(*shape, scale=3.0), random(shape[-1], seed=1)
    assert mx.allclose(row_kernels.rms_norm(x, weight, 1e-5), row_kernels._mlx_rms_norm(x, weight, 1e-5), atol=1e-5)
    for scale, eps in ((None, 1e-5), (weight, 0.0)):
        assert mx.allclose(row_kernels.rms_norm(x, scale, eps), row_kernels._mlx_rms_norm(x, scale, eps))


@needs_kernels
def test_model_code_finds_ours():
    import mlx.nn as nn
    import mlx_lm.models.activations as activations

    saved = mx.fast.scaled_dot_product_attention, mx.fast.rms_norm, mx.fast.rope, activations.swiglu
    try:
        row_kernels.install(activations)
        assert mx.fast.scaled_dot_product_attention is row_kernels.attention
        assert activations.swiglu is row_kernels.swiglu
        x = random(1, 2, 5, 16)
        assert mx.allclose(nn.RoPE(16)(x, offset=3), nn.RoPE(16, traditional=False)(x, offset=mx.array(3)), atol=1e-5)
        assert mx.allclose(nn.RMSNorm(16)(x), row_kernels._mlx_rms_norm(x, mx.ones((16,)), 1e-5), atol=1e-5)
    finally:
        mx.fast.scaled_dot_product_attention, mx.fast.rms_norm, mx.fast.rope, activations.swiglu = saved


@needs_kernels
def test_argmax_is_mlx_s_and_finds_broken_rows():
    x = random(5, 3000)
    places = row_kernels.argmax(x)
    assert places is not None and mx.array_equal(places, mx.argmax(x, axis=-1).astype(mx.int32))
    x[1, 2999], x[2, 0], x[3, 7] = mx.nan, mx.inf, -mx.inf
    assert (row_kernels.argmax(x) < 0).tolist() == [False, True, True, False, False]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_other_dtypes_go_mlx_s_way(dtype):
    x = random(4, 512).astype(dtype)
    assert mx.array_equal(row_kernels.softmax(x), mx.softmax(x, axis=-1))
    assert mx.array_equal(row_kernels.exp(x), mx.exp(x))
    weight = mx.ones((512,), dtype)
    assert mx.array_equal(row_kernels.rms_norm(x, weight, 1e-5), row_kernels._mlx_rms_norm(x, weight, 1e-5))
    q, k = random(1, 4, 64, 16).astype(dtype), random(1, 4, 64, 16).astype(dtype)
    ours = row_kernels.attention(q, k, k, scale=0.3, mask="causal")
    assert mx.array_equal(ours, row_kernels._mlx_attention(q, k, k, scale=0.3, mask="causal"))


def test_nothing_gives_nothing():
    empty, weight = mx.zeros((1, 4, 0, 16)), mx.ones((16,))
    keys = random(1, 4, 3, 16)
    assert row_kernels.attention(empty, keys, keys, scale=1.0).shape == (1, 4, 0, 16)
    assert row_kernels.rms_norm(empty, weight, 1e-5).shape == row_kernels.swiglu(empty, empty).shape == empty.shape
    turned = row_kernels.rope(empty, 16, traditional=False, base=1e4, scale=1.0, offset=0)
    assert turned.shape == row_kernels.exp(empty).shape == empty.shape


def test_without_the_library_all_is_mlx_s(monkeypatch):
    monkeypatch.setattr(row_kernels, "are_available", lambda: False)
    x = random(4, 512)
    assert mx.array_equal(row_kernels.softmax(x), mx.softmax(x, axis=-1))
    assert mx.array_equal(row_kernels.exp(x), mx.exp(x))
    q = random(1, 4, 64, 16)
    sinks = mx.zeros((4,))
    ours = row_kernels.attention(q, q, q, scale=0.3, mask=None, sinks=sinks)
    assert mx.array_equal(ours, row_kernels._mlx_attention(q, q, q, scale=0.3, mask=None, sinks=sinks))


@needs_kernels
def test_weights_in_huge_pages_keep_their_values():
    arrays = [mx.full((1024, 1024), float(i)) for i in range(6)] + [mx.ones((3,), dtype=mx.bfloat16), mx.array(2.0)]
    mx.eval(arrays)
    assert huge_pages.merge(arrays) >= 0
    assert all(bool((array == i).all()) for i, array in enumerate(arrays[:6]))
