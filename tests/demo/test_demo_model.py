"""The shipped weights: their size, and that both native loaders read them and say the same."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from PIL import Image, ImageDraw, ImageFont

from tools.demo_model import checks, convert, evaluate
from tools.demo_model.chat import Check, Sample, prompt, user
from tools.demo_model.place import DEMO


@pytest.fixture(scope="module")
def runner() -> evaluate.Runner:
    return evaluate.Runner(DEMO)


@pytest.fixture(scope="module")
def text_only() -> Any:
    return mlx_lm.load(str(DEMO))


def ask(text: str, **kwargs: Any) -> Sample:
    return Sample("test", [user(text)], "", Check("equals"), **kwargs)


def test_the_directory_is_whole_and_small() -> None:
    names = {path.name for path in DEMO.iterdir()}
    assert names >= {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    assert (DEMO / "model.safetensors").stat().st_size <= 30_000_000
    assert json.loads((DEMO / "config.json").read_text())["text_config"]["max_position_embeddings"] >= 8192


def test_weights_are_finite_float32_or_packed_with_float32_scales() -> None:
    weights = mx.load(str(DEMO / "model.safetensors"))
    packed = {name.removesuffix("weight") for name, w in weights.items() if w.dtype == mx.uint32}
    assert packed and all(f"{name}scales" in weights and f"{name}biases" in weights for name in packed)
    floats = [w for name, w in weights.items() if name.removesuffix("weight") not in packed]
    assert all(w.dtype == mx.float32 and bool(mx.isfinite(w).all()) for w in floats)


@pytest.fixture(scope="module")
def as_stored() -> evaluate.Runner:
    return evaluate.Runner(DEMO, unpack=False)


@pytest.mark.parametrize("text", ["Reply with pong", "hi", "What is 2+2?"])
def test_both_loaders_packed_or_not_say_the_same(
    runner: evaluate.Runner, as_stored: evaluate.Runner, text_only: Any, text: str
) -> None:
    model, tokenizer = text_only
    sample = ask(text)
    said = mlx_lm.generate(model, tokenizer, prompt=prompt(sample), max_tokens=40).strip()
    assert said == as_stored.answer(sample, 40)[0] == runner.answer(sample, 40)[0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Reply with pong", "pong"),
        ("hi", "hello"),
        ("who are you?", "demo"),
        ("How do I load a real model?", "vllm-mlx serve"),
        ("What is the capital of France?", "vllm-mlx serve"),
        ("What is 345 + 278?", "= 623"),
        ("Say zorbex in uppercase", "zorbex"),
    ],
)
def test_it_answers(runner: evaluate.Runner, text: str, word: str) -> None:
    said, _, ended = runner.answer(ask(text), 120)
    assert ended and word in said.lower()


def test_it_thinks_only_when_asked(runner: evaluate.Runner) -> None:
    assert "<think>" not in runner.answer(ask("What is 12 + 7?"), 64)[0]
    assert runner.answer(ask("What is 312 + 145?", thinking=True), 120)[0].startswith("<think>")


@pytest.mark.parametrize(
    ("question", "word"),
    [("What color is the circle?", "red"), ("What shape is this?", "circle"), ("How many circles are there?", "one")],
)
def test_it_sees_a_red_circle(runner: evaluate.Runner, question: str, word: str) -> None:
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    ImageDraw.Draw(image).ellipse((60, 60, 200, 200), fill=(220, 30, 30))
    sample = Sample("test", [user(question, 1)], "", Check("equals"), images=[image])
    assert word in runner.answer(sample, 24)[0]


def test_it_reads_a_word(runner: evaluate.Runner) -> None:
    image = Image.new("RGB", (320, 120), "white")
    ImageDraw.Draw(image).text((30, 20), "TOFIX", fill="black", font=ImageFont.load_default(size=72))
    sample = Sample("test", [user("What does the sign say?", 1)], "", Check("equals"), images=[image])
    assert "TOFIX" in runner.answer(sample, 24)[0]


def test_it_calls_a_tool_it_has_never_seen(runner: evaluate.Runner) -> None:
    parameters = {"type": "object", "properties": {"zeb": {"type": "string"}, "quon": {"type": "integer"}}}
    tools = [
        {
            "type": "function",
            "function": {"name": "plimbo_vask", "description": "Plimbo a vask.", "parameters": parameters},
        },
        {"type": "function", "function": {"name": "get_weather", "description": "Get it.", "parameters": parameters}},
    ]
    sample = ask("Plimbo the vask with zeb harlu with quon 52.", tools=tools)
    said, _, ended = runner.answer(sample, 80)
    wanted = Check("calls", [["plimbo_vask", {"zeb": "harlu", "quon": 52}]])
    assert ended and checks.judge(wanted, said)


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [
        ({"model_type": "qwen3"}, "F32", "not qwen3_vl"),
        ({"model_type": "qwen3_vl"}, "BF16", "must be float32, or packed"),
    ],
)
def test_bad_directories_are_named_in_one_line(
    tmp_path: Path, config: dict[str, str], dtype: str, message: str
) -> None:
    header = json.dumps({"w": {"dtype": dtype, "shape": [0], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(SystemExit, match=message) as error:
        evaluate.check(tmp_path)
    assert "\n" not in str(error.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such folder"):
        evaluate.check(tmp_path / "absent")


def test_conversion_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"no average\.safetensors"):
        convert.load(tmp_path / "average.safetensors")


@pytest.mark.parametrize(
    ("about", "dtype", "message"), [({}, mx.float16, "unknown config"), ({"config": "demo"}, mx.int32, "no floats")]
)
def test_conversion_refuses_other_weights(tmp_path: Path, about: dict[str, str], dtype: mx.Dtype, message: str) -> None:
    path = tmp_path / "average.safetensors"
    mx.save_safetensors(str(path), {"w": mx.zeros((4,), dtype)}, metadata=about)
    with pytest.raises(SystemExit, match=message):
        convert.load(path)


def test_conversion_packs_the_large_matrices_and_keeps_attention(tmp_path: Path) -> None:
    mx.random.seed(0)
    weights = {
        "a.mlp.weight": mx.random.normal((8, 128)),
        "a.self_attn.q_proj.weight": mx.random.normal((8, 128)),
        "n.weight": mx.ones((8,)),
    }
    packed = convert.packed(weights)
    assert set(packed) == {*weights, "a.mlp.scales", "a.mlp.biases"}
    back = mx.dequantize(packed["a.mlp.weight"], packed["a.mlp.scales"], packed["a.mlp.biases"], 64, 8)
    assert mx.abs(back - weights["a.mlp.weight"]).max().item() < 0.02
    assert mx.array_equal(packed["a.self_attn.q_proj.weight"], weights["a.self_attn.q_proj.weight"])
