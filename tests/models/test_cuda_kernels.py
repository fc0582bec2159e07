"""Our CUDA kernels against their plain twins, where there is such a GPU."""

from __future__ import annotations

import mlx.core as mx
import pytest

from tests.models import plain_kernels as plain
from vllm_mlx.models import cuda_kernels

pytestmark = pytest.mark.skipif(not cuda_kernels.are_available(), reason="no CUDA device here")

# Products of the twins are computed in TF32 on such a device.
CLOSE = {mx.float32: 2e-3, mx.float16: 8e-3, mx.bfloat16: 7e-2}


def assert_close(found, wanted, dtype) -> None:
    assert found.shape == wanted.shape and found.dtype == dtype
    assert mx.max(mx.abs(found.astype(mx.float32) - wanted.astype(mx.float32))).item() < CLOSE[dtype]


def normal(*shape, dtype):
    return mx.random.normal(shape).astype(dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize(
    "heads, kv_heads, dim", [(16, 8, 128), (32, 8, 128), (14, 2, 64), (8, 8, 128), (16, 2, 128), (6, 6, 64)]
)
@pytest.mark.parametrize("lengths", [(1,), (100,), (256, 257, 3), (5000, 1, 63, 64, 65, 4097)])
def test_attention_sees_the_first_tokens_of_each_row(heads, kv_heads, dim, lengths, dtype) -> None:
    mx.random.seed(1)
    rows, capacity = len(lengths), max(lengths) + 11
    queries = normal(rows, heads, 1, dim, dtype=dtype)
    keys, values = (normal(rows, kv_heads, capacity, dim, dtype=dtype) for _ in range(2))
    behind = mx.arange(capacity)[None, None, :, None] >= mx.array(lengths)[:, None, None, None]
    values = mx.where(behind, mx.array(float("nan"), dtype), values)  # of what lies behind nothing may be read
    counts = mx.array(lengths, dtype=mx.int32)
    found = cuda_kernels.ragged_attention(queries, keys, values, counts, max(lengths), dim**-0.5)
    clean = mx.where(behind, mx.array(0.0, dtype), values)
    assert_close(found, plain.ragged_attention(queries, keys, clean, counts, max(lengths), dim**-0.5), dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("num_tokens, heads, kv_heads, dim", [(1, 16, 8, 128), (9, 14, 2, 64), (70, 32, 8, 128)])
@pytest.mark.parametrize("has_norms", [True, False])
def test_heads_are_normed_and_turned(num_tokens, heads, kv_heads, dim, has_norms, dtype) -> None:
    mx.random.seed(2)
    x = normal(num_tokens, 1, (heads + 2 * kv_heads) * dim, dtype=dtype)
    norms = (1 + normal(dim, dtype=dtype) / 8, 1 + normal(dim, dtype=dtype) / 8) if has_norms else None
    positions = mx.array([977 * i % 30000 for i in range(num_tokens)], dtype=mx.int32)
    frequencies = 1e6 ** (-mx.arange(0, dim, 2, dtype=mx.float32) / dim)
    given = x, heads, kv_heads, norms, 1e-6, positions, frequencies
    for found, wanted in zip(cuda_kernels.turned_heads(*given), plain.turned_heads(*given), strict=True):
        assert_close(found, wanted, dtype)


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("num_tokens, width", [(1, 1024), (7, 3072), (65, 12288), (2, 8)])
def test_the_rest_of_a_layer(num_tokens, width, dtype) -> None:
    mx.random.seed(3)
    both = normal(num_tokens, 1, 2 * width, dtype=dtype) / 2
    assert_close(cuda_kernels.swiglu_halves(both), plain.swiglu_halves(both), dtype)
    x, y = (normal(num_tokens, 1, width, dtype=dtype) / 2 for _ in range(2))
    weight, eps = normal(width, dtype=dtype) / 2, 1e-5
    for found, wanted in zip(cuda_kernels.add_norm(x, y, weight, eps), plain.add_norm(x, y, weight, eps), strict=True):
        assert_close(found, wanted, dtype)
