"""The shipped weights: their size, and that both native loaders read them and say the same."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import pytest
from PIL import Image, ImageDraw

from tools.demo_model import evaluate
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


def test_weights_are_finite_float32() -> None:
    weights = mx.load(str(DEMO / "model.safetensors"))
    assert all(w.dtype == mx.float32 and bool(mx.isfinite(w).all()) for w in weights.values())


@pytest.mark.parametrize("text", ["Reply with pong", "hi", "who are you?", "What is 2+2?"])
def test_both_loaders_say_the_same(runner: evaluate.Runner, text_only: Any, text: str) -> None:
    model, tokenizer = text_only
    sample = ask(text)
    said = mlx_lm.generate(model, tokenizer, prompt=prompt(sample), max_tokens=40)
    assert said.strip() == runner.answer(sample, 40)[0]


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("Reply with pong", "pong"),
        ("hi", "hello"),
        ("who are you?", "demo"),
        ("How do I load a real model?", "vllm-mlx serve"),
    ],
)
def test_it_answers(runner: evaluate.Runner, text: str, word: str) -> None:
    said, _, ended = runner.answer(ask(text), 64)
    assert ended and word in said.lower()


def test_it_thinks_only_when_asked(runner: evaluate.Runner) -> None:
    assert "<think>" not in runner.answer(ask("What is 12 + 7?"), 64)[0]
    assert runner.answer(ask("What is 312 + 145?", thinking=True), 120)[0].startswith("<think>")


def test_it_sees_a_colour(runner: evaluate.Runner) -> None:
    image = Image.new("RGB", (256, 256), (250, 250, 250))
    ImageDraw.Draw(image).ellipse((60, 60, 200, 200), fill=(220, 30, 30))
    sample = Sample("test", [user("What color is the circle?", 1)], "", Check("equals"), images=[image])
    assert "red" in runner.answer(sample, 24)[0]


@pytest.mark.parametrize(
    ("config", "dtype", "message"),
    [({"model_type": "qwen3"}, "F32", "not qwen3_vl"), ({"model_type": "qwen3_vl"}, "BF16", "must be float32")],
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
