"""Multimodal models without a family file: asked through their own processor, one row at a time, exactly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.harness import EngineHarness
from tests.models.running import greedy
from tests.models.test_multimodal import NUM_TOKENS, mlx_vlm_greedy, mlx_vlm_inputs, rendered
from tests.tiny_vlms import picture
from vllm_mlx.engine.request import Prompt
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models import loader, multimodal
from vllm_mlx.models.family import find_family
from vllm_mlx.models.generic import GenericFamily, GenericMRopeFamily, find_generic_family
from vllm_mlx.models.media import MediaProcessor
from vllm_mlx.models.piecewise import why_whole
from vllm_mlx.models.profile import read_json


def load_without_family(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(multimodal, "find_family", lambda model_type: None)
    return loader.load(folder)


@pytest.mark.parametrize("name", ["smolvlm", "gemma3", "mistral3", "internvl"])
def test_any_processor_will_do(name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model(name)
    loaded = load_without_family(folder, monkeypatch)
    check_against_mlx_vlm(folder, loaded)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_5_mm"])
def test_positions_are_asked_of_the_model(
    name: str, tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_model(name)
    loaded = load_without_family(folder, monkeypatch)
    check_against_mlx_vlm(folder, loaded)


def test_a_model_that_nobody_wrote_a_file_for(tiny_model: Callable[..., Path]) -> None:
    folder = tiny_model("aya_vision")
    check_against_mlx_vlm(folder, loader.load(folder))


def check_against_mlx_vlm(folder: Path, loaded: Any) -> None:
    assert not loaded.profile.runs_batched and loaded.profile.shares_prefixes
    assert any("one request at a time" in note for note in loaded.profile.notes)
    images = [picture(1, (128, 64)), picture(2, (64, 130))]
    text = rendered(loaded, 2)
    token_ids, spans = loaded.media.expand(text, images)
    inputs = mlx_vlm_inputs(folder, text, images)
    assert list(token_ids) == inputs["input_ids"][0].tolist()
    expected = mlx_vlm_greedy(folder, inputs, NUM_TOKENS)
    assert greedy(loaded.model, token_ids, NUM_TOKENS, media=spans) == expected


def test_a_prompt_that_is_more_than_its_pieces_is_read_whole_one_row_after_another(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deepstack features are no embeddings: the trial at loading sees them."""
    folder = tiny_model("qwen3_vl")
    loaded = load_without_family(folder, monkeypatch)
    profile = loaded.profile
    assert not profile.shares_prefixes and not profile.interleaves
    assert any("deepstack_visual_embeds" in note for note in profile.notes)
    harness = EngineHarness(loaded.model, prefix_bytes=0)
    asked, expected = [], []
    for seeds in ([1], [2, 1], [2]):
        images = [picture(seed) for seed in seeds]
        text = rendered(loaded, len(images))
        asked.append(harness.ask(Prompt(*loaded.media.expand(text, images)), max_tokens=NUM_TOKENS))
        expected.append(mlx_vlm_greedy(folder, mlx_vlm_inputs(folder, text, images), NUM_TOKENS))
    harness.step(3)
    assert len(harness.scheduler.running) == 1
    harness.run()
    assert [harness.answers[i].tokens for i in asked] == expected


def test_models_that_mlx_vlm_computes_in_one_pass_are_not_cut() -> None:
    model = SimpleNamespace(language_model=SimpleNamespace(no_chunked_prefill=True))
    assert "one pass" in (why_whole(model, None, None) or "")  # type: ignore[arg-type]


def test_diffusion_models_are_refused() -> None:
    config = SimpleNamespace(canvas_length=256)
    model = SimpleNamespace(config=config, language_model=SimpleNamespace(generate=print))
    with pytest.raises(ModelLoadError, match="diffusion"):
        find_generic_family(model, "x", "diffusion_gemma")


def test_models_that_are_no_decoder_over_embeddings_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="nor this server"):
        find_generic_family(object(), "a depth estimator", "depth_anything")


def test_the_family_is_chosen_by_what_the_model_can_say() -> None:
    class Plain:
        def get_input_embeddings(self) -> None: ...

        class language_model: ...

    class Grid(Plain):
        class language_model:
            def get_rope_index(self) -> None: ...

    assert find_generic_family(Plain(), "x", "x") is GenericFamily
    assert find_generic_family(Grid(), "x", "x") is GenericMRopeFamily


def test_code_in_a_multimodal_checkpoint_is_not_run_unasked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "model"))
    marker = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')")
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "model_file": "evil.py"}))
    with pytest.raises(ModelLoadError, match="trust-remote-code"):
        loader.load(folder)
    assert not marker.exists()


def test_a_model_whose_encoders_cannot_run_is_served_as_text_and_says_so(
    tiny_model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ModelLoadError("its tower is of a kind unknown here")

    folder = tiny_model("qwen3_vl")
    monkeypatch.setattr(multimodal, "load_multimodal", refuse)
    loaded = loader.load(folder)
    assert loaded.media is None and not loaded.profile.is_multimodal
    assert any("without its encoders" in note and "unknown here" in note for note in loaded.profile.notes)
    with pytest.raises(ModelLoadError, match="unknown here"):
        loader.load(folder, mllm=True)


def test_gemma3n_embeds_the_end_of_image_with_the_image(tiny_model: Callable[..., Path]) -> None:
    """Its own tower is too large to build here; the tokenizer and processor of Gemma 3 name the same tokens."""
    gemma3 = loader.load(tiny_model("gemma3"))
    family_class = find_family("gemma3n")
    assert family_class is not None
    family = family_class(gemma3.profile, {}, gemma3.processor, gemma3.tokenizer)
    media = MediaProcessor(family, gemma3.tokenizer)
    token_ids, (span,) = media.expand("<bos>Look: <start_of_image>what", [picture(1)])
    end = gemma3.tokenizer.convert_tokens_to_ids("<end_of_image>")
    assert token_ids[span.end - 1] == end and span.length == 4 + 1


def test_a_processor_of_its_own_is_not_run_unasked(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model("smolvlm"), tmp_path / "model"))
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "minicpmv4_6"}))
    tokenizer_config = read_json(folder / "tokenizer_config.json")
    tokenizer_config["auto_map"] = {"AutoProcessor": "evil.Processor"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelLoadError, match="trust-remote-code"):
        loader.load(folder, mllm=True)
