"""Joint attention does what the listed classes of the installed mlx-lm do, and what `ByGroup` makes of them."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap

import mlx.core as mx
import pytest
from mlx_lm.models import llama, qwen3
from mlx_lm.models.cache import make_prompt_cache

from vllm_mlx.engine.kv_batch import BatchCache, grouped_entries
from vllm_mlx.engine.kv_cache import Layout
from vllm_mlx.models import joint
from vllm_mlx.models.grouped import ByGroup, RowWindow, Spread
from vllm_mlx.models.joint import PLAIN, WITH_NORMS, JointAttention, is_joint

WIDTH, LENGTHS = 64, (3, 5, 21, 22)
SHAPE = dict(hidden_size=WIDTH, num_hidden_layers=1, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
             head_dim=16, rms_norm_eps=1e-6, vocab_size=64, max_position_embeddings=512, rope_theta=1e4,
             tie_word_embeddings=True)  # fmt: skip


def forward_of(module: str) -> str:
    """The text of a class's forward without comments and layout."""
    attention = importlib.import_module(f"mlx_lm.models.{module}").Attention
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(attention.__call__))).body
    return ast.unparse(ast.Module(tree.body, []))


@pytest.mark.parametrize("module", PLAIN)
def test_listed_classes_compute_what_llama_does(module: str) -> None:
    assert forward_of(module) == forward_of("llama")


@pytest.mark.parametrize("module", WITH_NORMS)
def test_listed_classes_with_norms_compute_what_qwen3_does(module: str) -> None:
    assert forward_of(module) == forward_of("qwen3")


@pytest.mark.parametrize("composes", [False, True], ids=["fused", "composed"])
@pytest.mark.parametrize("family", [llama, qwen3])
@pytest.mark.parametrize("counts", [None, ((1, 3), (2, 1))], ids=["a token a row", "drafts behind some"])
def test_groups_give_what_the_module_gives_called_for_each(family, counts, composes, monkeypatch) -> None:
    monkeypatch.setattr(joint, "COMPOSES_MASKED", composes)
    model = family.Model(family.ModelArgs.from_dict({"model_type": "x", **SHAPE}))
    attention = model.layers[0].self_attn
    assert is_joint(attention)
    mx.random.seed(3)
    num_tokens = len(LENGTHS) if counts is None else sum(map(sum, counts))
    x = mx.random.normal((num_tokens, 1, WIDTH))
    results = []
    for wrap in (ByGroup, JointAttention):
        wrapped = wrap(attention, ("x", "mask", "cache"), RowWindow())
        (entry,) = grouped_entries(*two_groups(model, attention, counts))
        mask = entry.make_mask(1)
        results.append(wrapped(x, mask, entry))
    assert results[0].shape == (num_tokens, 1, WIDTH)
    assert mx.allclose(results[0], results[1], atol=1e-5)
    assert not mx.allclose(results[0], mx.zeros_like(results[0]), atol=1e-2)


def test_one_group_attends_alike_composed_and_fused(monkeypatch) -> None:
    model = qwen3.Model(qwen3.ModelArgs.from_dict({"model_type": "x", **SHAPE}))
    attention = model.layers[0].self_attn
    wrapped = JointAttention(attention, ("x", "mask", "cache"), RowWindow())
    mx.random.seed(3)
    x = mx.random.normal((2, 1, WIDTH))
    results = []
    for composes in (False, True):
        monkeypatch.setattr(joint, "COMPOSES_MASKED", composes)
        caches, _ = two_groups(model, attention, None)
        (entry,) = caches[0].entries
        results.append(wrapped(x, entry.make_mask(1), entry))
    assert mx.allclose(results[0], results[1], atol=1e-5) and results[0].shape == (2, 1, WIDTH)


def two_groups(model, attention, counts):
    """Rows of lengths 3 and 5, and of 21 and 22, filled with the same keys each time."""
    mx.random.seed(1)
    layout = Layout(lambda: make_prompt_cache(model))
    caches, spreads = [], []
    for place, lengths in enumerate((LENGTHS[:2], LENGTHS[2:])):
        cache = None
        for length in lengths:
            row = layout.new_row()
            attention(mx.random.normal((1, length, WIDTH)), "causal", row.entries[0])
            one = BatchCache(row)
            one.adopt(row, 32)
            if cache is None:
                cache = one
            else:
                cache.append(one)
        own = counts[place] if counts is not None else None
        cache.begin(list(lengths), max(own) if own else 1)
        caches.append(cache)
        spreads.append(Spread(own) if own else None)
    return caches, spreads
