"""Loading: dtypes, memory, odd but good folders, and folders that cannot be served."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import pytest
from mlx.utils import tree_flatten

from tests import tiny_models
from tests.models.running import greedy
from tests.models.test_profile import edit, shard
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models import loader
from vllm_mlx.models.weights import Precision, choose_precision, dequantize

Tiny = Callable[..., Path]
PROMPT = "The quick brown fox jumps over the lazy dog. "


@pytest.fixture
def folder(tiny_model: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


def refusal(folder: Path, **options: object) -> str:
    with pytest.raises(ModelLoadError) as caught:
        loader.load(folder, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(message) < 600
    return message


# -- dtype -------------------------------------------------------------------------------------------------------------


def test_on_the_cpu_16_bit_weights_become_float32(tiny_model: Tiny) -> None:
    loaded = loader.load(tiny_model("qwen3", dtype="bfloat16"))
    assert loaded.profile.dtype == "float32"
    assert any("float32" in note for note in loaded.profile.notes)


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe", "gpt_oss", "mamba2"])
def test_on_the_cpu_quantised_weights_are_unpacked_exactly(name: str, tiny_model: Tiny) -> None:
    folder = tiny_model(name, dtype="bfloat16", quantize_bits=4)
    loaded = loader.load(folder)
    assert (loaded.profile.dtype, loaded.profile.quantization) == ("float32", None)
    assert loaded.profile.weights_bytes > 3 * loader.read_profile(folder).weights_bytes
    # The oracle computes with packed weights and float32 scales: the same numbers, by another kernel.
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    token_ids = tokenizer.encode(PROMPT)
    expected = model(mx.array([token_ids]))
    assert mx.allclose(
        loaded.model.prefill(mx.array([token_ids]), 0, loaded.model.make_cache(), None, {}), expected, atol=1e-3
    )


@pytest.mark.parametrize("stack", ["mlx_lm", "mlx_vlm"])
def test_every_kind_of_quantised_layer_is_unpacked(stack: str) -> None:
    mla = importlib.import_module(f"{stack}.models.mla")
    switch = importlib.import_module(f"{stack}.models.switch_layers")

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(32, 8)
            self.embedding = nn.Embedding(10, 32)
            self.experts = switch.SwitchLinear(32, 8, 3, bias=True)
            self.heads = mla.MultiLinear(32, 8, 2)

    model = Model()
    nn.quantize(model, group_size=32, bits=8)
    packed = {name: type(m).__name__ for name, m in model.named_modules() if name}
    assert all(kind.startswith("Quantized") for kind in packed.values())
    x, tokens, experts = mx.random.normal((2, 1, 32)), mx.array([3, 7]), mx.array([[2], [0]])
    before = (model.linear(x), model.embedding(tokens), model.experts(x, experts), model.heads(x))
    dequantize(model, mx.float32)
    kinds = {type(m).__name__ for _, m in model.named_modules()}
    assert not any(kind.startswith("Quantized") for kind in kinds)
    after = (model.linear(x), model.embedding(tokens), model.experts(x, experts), model.heads(x))
    assert all(mx.allclose(a, b, atol=1e-4) for a, b in zip(before, after, strict=True))


def test_asked_for_a_dtype_the_model_has_it(tiny_model: Tiny) -> None:
    loaded = loader.load(tiny_model("qwen3"), dtype="bfloat16")
    assert loaded.profile.dtype == "bfloat16"
    packed = loader.load(tiny_model("qwen3", quantize_bits=4), dtype="float16")
    assert packed.profile.dtype == "float16" and packed.profile.quantization is not None


def test_keep_leaves_weights_as_they_are_stored_on_a_cpu_too(tiny_model: Tiny) -> None:
    stored = tiny_model("qwen3", dtype="bfloat16", quantize_bits=4)
    profile = loader.load(stored, dtype="keep").profile
    assert profile.dtype == "bfloat16" and profile.quantization is not None and not profile.notes


def test_an_unknown_dtype_is_refused(folder: Path) -> None:
    assert "--dtype int3 is unknown" in refusal(folder, dtype="int3")


def test_multimodal_weights_are_converted_too(tiny_model: Tiny) -> None:
    loaded = loader.load(tiny_model("qwen3_vl"), dtype="float16")
    assert loaded.profile.dtype == "float16"


def precision(**changes: object) -> object:
    facts: dict[str, object] = dict(
        dtype="auto",
        is_cpu=True,
        num_parameters=1000,
        is_quantized=False,
        stored_dtype="bfloat16",
        available_bytes=8001,
    )
    return choose_precision(**{**facts, **changes})  # type: ignore[arg-type]


def test_keep_and_an_unpack_limit_leave_the_weights_as_stored() -> None:
    assert precision(dtype="keep") == Precision()
    assert precision() != Precision() and precision(unpack_limit_bytes=1000).dtype is None  # type: ignore[attr-defined]


def test_auto_keeps_what_is_stored_on_a_gpu() -> None:
    assert precision(is_cpu=False).dtype is None  # type: ignore[attr-defined]


def test_auto_unpacks_only_into_half_of_the_memory() -> None:
    assert precision(is_quantized=True).dequantize  # type: ignore[attr-defined]
    tight = precision(is_quantized=True, available_bytes=7999)
    assert (tight.dtype, tight.dequantize) == ("float32", False)  # type: ignore[attr-defined]
    plain = precision(available_bytes=7999)
    assert plain.dtype is None and "stay bfloat16" in plain.note  # type: ignore[attr-defined]


# -- good folders of every shape ---------------------------------------------------------------------------------------


def test_sharded_weights_load(folder: Path, tiny_model: Tiny) -> None:
    shard(folder)
    loaded, whole = loader.load(folder), loader.load(tiny_model("qwen3"))
    token_ids = loaded.tokenizer.encode(PROMPT)
    assert greedy(loaded.model, token_ids, 6) == greedy(whole.model, token_ids, 6)


def test_tied_embeddings_are_stored_and_loaded_once(tiny_model: Tiny) -> None:
    weights = mx.load(str(tiny_model("qwen3") / "model.safetensors"))
    assert "lm_head.weight" not in weights
    assert loader.load(tiny_model("qwen3")).profile.num_parameters == sum(w.size for w in weights.values())


def test_a_model_without_a_chat_template_still_completes(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    loaded = loader.load(folder)
    assert loaded.profile.chat_template is None
    assert len(greedy(loaded.model, loaded.tokenizer.encode(PROMPT), 3)) == 3


def test_a_config_that_transformers_refuses_does_not_cost_the_tokenizer(folder: Path) -> None:
    edit(folder / "config.json", max_window_layers="many", use_sliding_window="no")
    loaded = loader.load(folder)
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(PROMPT)) == PROMPT
    assert loaded.tokenizer.eos_token == "<|im_end|>"


# -- folders that cannot be served -------------------------------------------------------------------------------------


def test_an_unknown_architecture_is_named(folder: Path) -> None:
    edit(folder / "config.json", model_type="gpt_seventeen")
    message = refusal(folder)
    assert "gpt_seventeen" in message and "update" in message


def test_weights_of_another_architecture_are_named(folder: Path) -> None:
    edit(folder / "config.json", model_type="llama")
    assert "do not fit the architecture" in refusal(folder)


def test_a_config_that_lacks_a_field_is_named(folder: Path) -> None:
    edit(folder / "config.json", hidden_size=None)
    assert "config.json" in refusal(folder) and "hidden_size" in refusal(folder)


def test_a_model_too_big_for_memory_is_refused_before_it_is_read(folder: Path) -> None:
    message = refusal(folder, memory_limit_bytes=1000)
    assert "memory" in message and "smaller" in message


def test_a_folder_without_a_tokenizer_is_named(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    assert "no tokenizer" in refusal(folder)


def test_code_in_a_checkpoint_is_not_run_unasked(folder: Path) -> None:
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    edit(folder / "config.json", model_file="evil.py")
    assert "--trust-remote-code" in refusal(folder)


def test_a_closed_model_lets_go_of_its_weights(tiny_model: Tiny) -> None:
    loaded = loader.load(tiny_model("llama"))
    before = mx.get_active_memory()
    loaded.model.close()
    assert mx.get_active_memory() < before


def test_every_tiny_model_is_small(tiny_model: Tiny) -> None:
    for name in tiny_models.TEXT:
        folder = tiny_model(name)
        assert sum(f.stat().st_size for f in folder.iterdir()) < 3 << 20
        assert json.loads((folder / "config.json").read_text())["model_type"] == name


def test_parameters_of_the_profile_equal_those_loaded(tiny_model: Tiny) -> None:
    for name in ("qwen3", "gpt_oss", "mamba2"):
        folder = tiny_model(name)
        weights = mx.load(str(folder / "model.safetensors"))
        assert loader.read_profile(folder).num_parameters == sum(v.size for _, v in tree_flatten(weights))
