"""Layers in few launches against the layers themselves; the kernels' plain twins stand in for them."""

from __future__ import annotations

import importlib

import mlx.core as mx
import mlx.nn as nn
import pytest

from tests.models import plain_kernels
from vllm_mlx.engine.kv_batch import BatchCache, grouped_entries
from vllm_mlx.engine.kv_cache import Layout
from vllm_mlx.models import cuda_kernels, fused, joint
from vllm_mlx.models.fused import FAMILIES, FusedLayer, as_product
from vllm_mlx.models.profile import ModelProfile
from vllm_mlx.models.text import TextModel

SHAPE = dict(hidden_size=64, num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
             head_dim=64, rms_norm_eps=1e-5, vocab_size=80, max_position_embeddings=512, rope_theta=1e4,
             tie_word_embeddings=True, attention_bias=False, attention_out_bias=False, mlp_bias=False)  # fmt: skip
LENGTHS = (3, 5, 21, 22)


def make_model(family: str, bits: int = 0):
    module = importlib.import_module(f"mlx_lm.models.{family}")
    mx.random.seed(5)
    shape = dict(SHAPE)
    if family in ("qwen2", "mimo"):  # they have no head_dim of their own
        shape["hidden_size"] = SHAPE["num_attention_heads"] * SHAPE["head_dim"]
    if family == "llama":
        shape["rope_scaling"] = {"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 128}
    model = module.Model(module.ModelArgs.from_dict({"model_type": family, **shape}))
    if bits:
        for layer in model.model.layers:
            nn.quantize(layer, 32, bits)
    return model


@pytest.fixture
def kernels(monkeypatch):
    """As on a CUDA device. Returns how often each kernel's twin was asked."""
    counts: dict[str, int] = {}

    def counted(twin):
        def call(*args):
            counts[twin.__name__] = counts.get(twin.__name__, 0) + 1
            return twin(*args)

        return call

    for twin in plain_kernels.ALL:
        monkeypatch.setattr(cuda_kernels, twin.__name__, counted(twin))
    fused._heads.cache_clear()  # what was compiled has the last test's twins in it
    fused._rest.cache_clear()
    monkeypatch.setattr(cuda_kernels, "are_available", lambda: True)
    monkeypatch.setattr(joint, "COMPOSES_MASKED", True)
    return counts


def decode(model, lengths_of_groups):
    """Logits of a step of rows in groups, after their prompts."""
    layout = Layout(model.make_cache)
    mx.random.seed(1)
    caches, tokens, positions = [], [], []
    for lengths in lengths_of_groups:
        cache = None
        for length in lengths:
            row = layout.new_row()
            prompt = mx.random.randint(0, 80, (1, length))
            model.prefill(prompt, 0, row.entries, None, {})
            one = BatchCache(row)
            one.adopt(row, 40)
            if cache is None:
                cache = one
            else:
                cache.append(one)
            tokens.append(length % 80)
            positions.append(length)
        cache.begin(list(lengths))
        caches.append(cache)
    entries = caches[0].entries if len(caches) == 1 else grouped_entries(caches)
    return model.decode(mx.array(tokens)[:, None], positions, entries, [None] * len(tokens))


def as_text_model(model, tmp_path) -> TextModel:
    return TextModel(model, ModelProfile("x", tmp_path, model.args.model_type, vocab_size=80))


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("groups", [(LENGTHS[:2], LENGTHS[2:]), (LENGTHS,), ((7, 7),), ((9,),)], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_fused_layers_is_the_plain_step(family, groups, bits, kernels, tmp_path, monkeypatch) -> None:
    with monkeypatch.context() as plainly:
        plainly.setattr(cuda_kernels, "are_available", lambda: False)
        plainly.setattr(joint, "COMPOSES_MASKED", False)
        wanted = decode(as_text_model(make_model(family, bits), tmp_path), groups)
        mx.eval(wanted)
    model = make_model(family, bits)
    served = as_text_model(model, tmp_path)
    assert all(isinstance(layer, FusedLayer) for layer in model.layers)
    assert kernels == dict(turned_heads=1, ragged_attention=2, add_norm=2, swiglu_halves=1)  # compiled at once
    kernels.clear()
    found = decode(served, groups)
    assert mx.allclose(found, wanted, atol=2e-5), mx.max(mx.abs(found - wanted))
    assert kernels.get("ragged_attention", 0) == (3 * sum(len(set(group)) > 1 for group in groups))


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_prompt_in_chunks_is_the_plain_prompt(family, kernels, tmp_path, monkeypatch) -> None:
    mx.random.seed(4)
    tokens = mx.random.randint(0, 80, (1, 30))

    def logits_of(served):
        row = Layout(served.make_cache).new_row()
        return mx.concatenate([served.prefill(tokens[:, a:b], a, row.entries, None, {})
                               for a, b in ((0, 17), (17, 29), (29, 30))], axis=1)  # fmt: skip

    with monkeypatch.context() as plainly:
        plainly.setattr(cuda_kernels, "are_available", lambda: False)
        wanted = logits_of(as_text_model(make_model(family), tmp_path))
        mx.eval(wanted)
    served = as_text_model(make_model(family), tmp_path)
    kernels.clear()
    assert mx.allclose(logits_of(served), wanted, atol=2e-5)
    assert kernels["turned_heads"] == 2 and "ragged_attention" not in kernels  # for two lengths


def test_layers_are_plain_as_long_as_adapters_are_loaded(kernels, tmp_path) -> None:
    model = make_model("qwen3")
    served = as_text_model(model, tmp_path)
    assert decode(served, (LENGTHS,)).shape == (4, 80)
    kernels.clear()
    model.layers[0]._window.is_adapted = True
    decode(served, (LENGTHS,))
    assert set(kernels) == {"ragged_attention"}


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm", "q_norm"])
def test_norms_of_another_type_stay_plain(norm, kernels, tmp_path) -> None:
    model = make_model("qwen3")
    model.set_dtype(mx.bfloat16)
    layer = model.model.layers[1]
    module = layer.self_attn.q_norm if norm == "q_norm" else getattr(layer, norm)
    module.weight = module.weight.astype(mx.float32)
    served = as_text_model(model, tmp_path)
    fused_layers = [isinstance(layer, FusedLayer) for layer in model.model.layers]
    # The layer before norms for the next one too.
    assert fused_layers == [norm != "input_layernorm", False, True]
    assert decode(served, (LENGTHS,)).shape == (4, 80)


def test_what_was_fused_can_be_taken_apart(kernels, tmp_path) -> None:
    model = make_model("llama")
    layers = list(model.layers)
    served = as_text_model(model, tmp_path)
    served.ungroup()
    assert not any(isinstance(layer, FusedLayer) for layer in model.layers) and len(layers) == len(model.layers)
    assert type(model.layers[0].self_attn).__module__ == "mlx_lm.models.llama"


def test_a_product_holds_nothing_twice_and_its_layers_keep_working() -> None:
    linears = [nn.Linear(32, size) for size in (64, 32)]
    x = mx.random.normal((5, 32))
    wanted = mx.concatenate([linear(x) for linear in linears], axis=-1)
    mx.eval(wanted)
    product, arrays = as_product(linears)
    assert mx.allclose(product.of(x, arrays), wanted, atol=1e-6)
    assert mx.allclose(mx.concatenate([linear(x) for linear in linears], axis=-1), wanted, atol=1e-6)


@pytest.mark.parametrize("case", ["a bias", "bits", "another kind"])
def test_layers_that_are_not_alike_stay_apart(case) -> None:
    first, second = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=case == "a bias")
    if case == "bits":
        first, second = nn.QuantizedLinear.from_linear(first, 32, 4), nn.QuantizedLinear.from_linear(second, 32, 8)
    elif case == "another kind":
        second = nn.QuantizedLinear.from_linear(second, 32, 4)
    assert as_product([first, second]) is None
