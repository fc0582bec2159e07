"""Attention of prompts on a grid of shapes, and composed, against MLX's own."""

from __future__ import annotations

import mlx.core as mx
import pytest

from vllm_mlx.models import prompt_attention
from vllm_mlx.models.prompt_attention import GRID, attention


@pytest.fixture
def shapes(monkeypatch) -> list[tuple[int, int]]:
    """(queries, keys) of each call of MLX's own."""
    seen: list[tuple[int, int]] = []
    own = prompt_attention._mlx_attention

    def call(q, k, v, **options):
        seen.append((q.shape[2], k.shape[2]))
        return own(q, k, v, **options)

    monkeypatch.setattr(prompt_attention, "_mlx_attention", call)
    return seen


def normal(*shape):
    return mx.random.normal(shape).astype(mx.float16)


def given(num_queries, num_keys, rows=1):
    mx.random.seed(num_keys)
    return normal(rows, 4, num_queries, 16), normal(rows, 2, num_keys, 16), normal(rows, 2, num_keys, 16)


def causal(num_queries, num_keys):
    return (mx.arange(num_keys - num_queries, num_keys)[:, None] >= mx.arange(num_keys)[None])[None, None]


@pytest.mark.parametrize(
    "num_queries, num_keys", [(100, 100), (256, 256), (37, 700), (2, 257), (300, 300), (256, 512), (40, 4500)]
)
def test_a_causal_prompt_is_computed_on_the_grid(num_queries, num_keys, shapes) -> None:
    q, k, v = given(num_queries, num_keys)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=causal(num_queries, num_keys))
    found = attention(q, k, v, scale=0.3, mask="causal")
    assert found.shape == wanted.shape and mx.allclose(found, wanted, atol=4e-3)
    assert all(n % GRID == 0 for pair in shapes for n in pair) and len(shapes) == 1


def test_rows_are_computed_one_by_one(shapes) -> None:
    q, k, v = given(40, 300, rows=3)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=causal(40, 300))
    assert mx.allclose(attention(q, k, v, scale=0.3, mask="causal"), wanted, atol=4e-3)
    assert shapes == [(256, 512)] * 3


@pytest.mark.parametrize("rows, num_queries, num_keys", [(1, 30, 30), (3, 20, 75)])
def test_under_a_mask_it_is_composed(rows, num_queries, num_keys, shapes) -> None:
    q, k, v = given(num_queries, num_keys, rows)
    mask = mx.random.uniform(shape=(rows, 1, num_queries, num_keys)) < 0.5
    mask = mask | causal(num_queries, num_keys)
    wanted = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)
    found = attention(q, k, v, scale=0.3, mask=mask)
    assert found.shape == wanted.shape and mx.allclose(found, wanted, atol=4e-3) and not shapes


@pytest.mark.parametrize("case", ["one query", "no mask", "float32", "too many scores", "bias"])
def test_all_else_is_mlx_own(case, shapes, monkeypatch) -> None:
    q, k, v = given(20, 50)
    mask = causal(20, 50)
    if case == "one query":
        q, mask = q[:, :, :1], None
    elif case == "no mask":
        mask = None
    elif case == "float32":
        q, k, v, mask = q.astype(mx.float32), k.astype(mx.float32), v.astype(mx.float32), "causal"
    elif case == "too many scores":
        monkeypatch.setattr(prompt_attention, "MOST_SCORES", 3999)
    else:
        mask = mx.where(mask, 0.0, -1e4).astype(mx.float16)
    found = attention(q, k, v, scale=0.3, mask=mask)
    assert shapes == [(q.shape[2], 50)]
    assert mx.array_equal(found, prompt_attention._mlx_attention(q, k, v, scale=0.3, mask=mask))
