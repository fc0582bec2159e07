"""Rows with different LoRA adapters in one batch: each one's greedy tokens equal mlx-lm's with that adapter alone."""

from __future__ import annotations

import json
import random
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from tests import tiny_models
from tests.engine.harness import EngineHarness
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models.adapters import linear_layers
from vllm_mlx.models.loader import LoadedModel, load

NUM_TOKENS = 12
KINDS = {
    "first": dict(rank=4, keys=("self_attn.q_proj", "self_attn.v_proj"), layers=None),
    "second": dict(rank=8, keys=("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj"), layers=None),
    "third": dict(rank=2, keys=("mlp.up_proj",), layers=2),
}


def write_adapter(folder: Path, base: Path, *, rank: int, keys: tuple[str, ...], layers: int | None, seed: int) -> Path:
    """A random adapter as mlx-lm writes them, for the last `layers` of the model in `base`."""
    folder.mkdir(parents=True)
    model, config = load_model(base)
    layers = layers or len(model.layers)
    parameters = {"rank": rank, "scale": 6.0, "dropout": 0.0, "keys": list(keys)}
    settings = {"fine_tune_type": "lora", "num_layers": layers, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    mx.random.seed(seed)
    weights = {}
    for path, place in linear_layers(model):
        number, leaf = path.removeprefix("layers.").split(".", 1)
        if leaf in keys and int(number) >= len(model.layers) - layers:
            module = place.module
            shape = module.weight.shape
            num_in = shape[1] * 32 // module.bits if hasattr(module, "bits") else shape[1]
            weights[f"model.{path}.lora_a"] = mx.random.normal((num_in, rank)) * 0.3
            weights[f"model.{path}.lora_b"] = mx.random.normal((rank, shape[0])) * 0.3
    mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
    return folder


class Subject:
    def __init__(self, name: str, root: Path, quantize_bits: int | None) -> None:
        self.base = tiny_models.build(name, root / "base", quantize_bits=quantize_bits)
        self.folders = {
            key: write_adapter(root / key, self.base, seed=i, **kind) for i, (key, kind) in enumerate(KINDS.items())
        }
        rng = random.Random(name)
        self.prompts = [[rng.randrange(20, 590) for _ in range(n)] for n in (3, 20, 40)]
        self.expected = {key: self._reference(key) for key in ("", *KINDS)}
        answers = {tuple(map(tuple, answers)) for answers in self.expected.values()}
        assert len(answers) == 4, "adapters that change nothing"

    def _reference(self, key: str) -> list[list[int]]:
        model, _ = load_model(self.base)
        if key:
            load_adapters(model, str(self.folders[key]))
            model.eval()
        steps = (generate_step(mx.array(prompt), model, max_tokens=NUM_TOKENS) for prompt in self.prompts)
        return [[int(token) for token, _ in answer] for answer in steps]

    def load(self) -> LoadedModel:
        loaded = load(self.base, dtype="keep")
        for key, folder in self.folders.items():
            loaded.model.adapters.load(key, folder)
        return loaded


@pytest.fixture(scope="module", params=["llama", "qwen3", "qwen3-4bit"])
def subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    name, _, bits = request.param.partition("-")
    return Subject(name, tmp_path_factory.mktemp("adapters"), 4 if bits else None)


def namespaces(key: str) -> dict[str, str]:
    return {"adapter": key, "namespace": key}


def test_each_alone_and_all_in_one_batch_equal_mlx_lm(subject: Subject) -> None:
    model = subject.load().model
    harness = EngineHarness(model, chunk=256)
    for _ in range(2):  # the second time with prefix hits
        asked = {}
        for i, prompt in enumerate(subject.prompts):
            for key in subject.expected:
                asked[harness.ask(prompt, max_tokens=NUM_TOKENS, **namespaces(key))] = subject.expected[key][i]
                harness.step(i)
        harness.run()
        assert {id: harness.answers[id].tokens for id in asked} == asked
    assert harness.cache.counters.num_cached_tokens > 0 and harness.runner.metrics()["num_packed_chunks"] > 0
    for key, answers in subject.expected.items():
        assert harness.lone(subject.prompts[1], max_tokens=NUM_TOKENS, **namespaces(key)) == answers[1]


def test_an_adapter_that_comes_and_goes_leaves_the_others_as_they_were(subject: Subject) -> None:
    model = subject.load().model
    harness = EngineHarness(model, prefix_bytes=0)
    model.adapters.unload("second")
    model.adapters.load("again", subject.folders["third"])
    for key, kind in (("first", "first"), ("again", "third"), ("third", "third"), ("", "")):
        assert harness.lone(subject.prompts[2], max_tokens=NUM_TOKENS, adapter=key) == subject.expected[kind][2]


def test_with_the_last_adapter_gone_the_model_is_the_plain_one(subject: Subject) -> None:
    loaded = subject.load()
    before = {path: type(place.module).__name__ for path, place in linear_layers(loaded.model._model)}
    assert "AdaptedLinear" in before.values()
    for key in KINDS:
        loaded.model.adapters.unload(key)
    assert "AdaptedLinear" not in {type(place.module).__name__ for _, place in linear_layers(loaded.model._model)}
    assert EngineHarness(loaded.model).lone(subject.prompts[0], max_tokens=NUM_TOKENS) == subject.expected[""][0]


def test_peft_folders_are_read_too(subject: Subject, tmp_path: Path) -> None:
    arrays = mx.load(str(subject.folders["first"] / "adapters.safetensors"))
    turned = {}
    for name, array in arrays.items():
        half = "lora_A" if name.endswith("lora_a") else "lora_B"
        turned[f"base_model.model.{name[:-7]}.{half}.weight"] = array.T
    mx.save_safetensors(str(tmp_path / "adapter_model.safetensors"), turned)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 24}))
    model = load(subject.base, dtype="keep").model
    facts = model.adapters.load("peft", tmp_path)
    assert facts.rank == 4
    harness = EngineHarness(model)
    assert harness.lone(subject.prompts[1], max_tokens=NUM_TOKENS, adapter="peft") == subject.expected["first"][1]


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(tmp_path: Path) -> None:
    base = tiny_models.build("qwen3", tmp_path / "base")
    wide = dict(tiny_models.TEXT["qwen3"], hidden_size=128)
    model = load(base).model

    def refused(folder: Path, words: str) -> None:
        with pytest.raises(ModelLoadError, match=words) as error:
            model.adapters.load("bad", folder)
        assert "\n" not in str(error.value) and model.adapters.names == ()

    refused(tmp_path / "nowhere", "is not a folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "lacks adapter_config.json")
    for name, arrays, config, words in (
        ("shape", {"layers.0.self_attn.q_proj.lora_a": (wide["hidden_size"], 4),
                   "layers.0.self_attn.q_proj.lora_b": (4, 64)}, {}, "made for a layer from 128 to 64"),
        ("path", {"layers.99.self_attn.q_proj.lora_a": (64, 4),
                  "layers.99.self_attn.q_proj.lora_b": (4, 64)}, {}, "which this model has not"),
        ("half", {"layers.0.self_attn.q_proj.lora_a": (64, 4)}, {}, "no pair of fitting matrices"),
        ("other", {"lm_head.weight": (4, 4)}, {}, "not a low-rank layer"),
        ("dora", {"layers.0.self_attn.q_proj.lora_a": (64, 4)}, {"fine_tune_type": "dora"}, "not plain LoRA but dora"),
    ):  # fmt: skip
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        mx.save_safetensors(str(folder / "adapters.safetensors"), {k: mx.ones(v) for k, v in arrays.items()})
        refused(folder, words)
