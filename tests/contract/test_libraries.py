"""The names, parameters and versions of mlx-lm and mlx-vlm that `models` stands on."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import inspect

import mlx.core as mx
import mlx_lm.models.cache as lm_cache
import mlx_lm.utils
import mlx_vlm.models.cache as vlm_cache
import mlx_vlm.utils
import pytest
from mlx_vlm.models.base import InputEmbeddingsFeatures, LanguageModelOutput

from vllm_mlx.models.text import BATCHABLE_CACHES


def parameters(function: object) -> set[str]:
    return set(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_versions_are_those_that_were_tested() -> None:
    """mlx-lm breaks in minor releases, mlx-vlm in any: a new one must pass these tests before it is allowed."""
    assert importlib.metadata.version("mlx-lm").startswith("0.32.")
    assert importlib.metadata.version("mlx-vlm") == "0.7.10"


def test_loading_functions_take_what_we_pass() -> None:
    assert parameters(mlx_lm.utils.load_model) >= {"model_path", "lazy", "trust_remote_code"}
    assert parameters(mlx_vlm.utils.load_model) >= {"model_path", "lazy", "kwargs"}
    assert parameters(mlx_vlm.utils.load_processor) >= {"model_path", "add_detokenizer", "kwargs"}


@pytest.mark.parametrize("module", [lm_cache, vlm_cache], ids=["mlx_lm", "mlx_vlm"])
def test_both_stacks_name_their_caches_alike(module: object) -> None:
    for name in (*BATCHABLE_CACHES, "CacheList", "ChunkedKVCache", "make_prompt_cache"):
        assert hasattr(module, name)


def test_the_two_stacks_have_classes_of_their_own() -> None:
    """Which is why the engine goes by class name, and hands recurrent state back in the class it came in."""
    for name in BATCHABLE_CACHES:
        assert getattr(lm_cache, name) is not getattr(vlm_cache, name)


def test_embedding_features_have_the_fields_we_sort() -> None:
    fields = {f.name for f in dataclasses.fields(InputEmbeddingsFeatures)}
    assert fields >= {"inputs_embeds", "position_ids", "rope_deltas", "attention_mask_4d", "deepstack_visual_embeds"}
    assert "logits" in {f.name for f in dataclasses.fields(LanguageModelOutput)}


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5"])
def test_mrope_models_take_positions_from_the_caller(model_type: str) -> None:
    module = importlib.import_module(f"mlx_vlm.models.{model_type}")
    assert parameters(module.LanguageModel.__call__) >= {"inputs", "inputs_embeds", "cache", "kwargs"}
    assert 'kwargs.pop("position_ids"' in inspect.getsource(module.LanguageModel.__call__)


def test_quantised_arrays_unpack_in_the_dtype_of_their_scales() -> None:
    weight = mx.random.normal((8, 64))
    packed, scales, biases = mx.quantize(weight, group_size=32, bits=4)
    assert mx.dequantize(packed, scales, biases, group_size=32, bits=4).dtype == mx.float32
    half = mx.dequantize(packed, scales.astype(mx.float16), biases.astype(mx.float16), group_size=32, bits=4)
    assert half.dtype == mx.float16
