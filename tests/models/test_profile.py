"""What is read of a folder without loading it, and what is said of a folder that cannot be served."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.errors import ModelLoadError
from vllm_mlx.models.profile import ModelProfile, read_profile

Tiny = Callable[..., Path]


@pytest.fixture
def folder(tiny_model: Tiny, tmp_path: Path) -> Path:
    """A copy of the tiny qwen3 that a test may spoil."""
    return Path(shutil.copytree(tiny_model("qwen3"), tmp_path / "model"))


@pytest.fixture
def vlm_folder(tiny_model: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model("qwen3_vl"), tmp_path / "vlm"))


def edit(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; None removes one."""
    value = json.loads(path.read_text()) if path.exists() else {}
    value.update(changes)
    path.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def shard(folder: Path) -> list[Path]:
    """Rewrite the one weight file as two with an index; returns them."""
    import mlx.core as mx

    weights = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    files = [folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors"]
    for i, file in enumerate(files):
        mx.save_safetensors(str(file), {n: weights[n] for n in names[i::2]}, {"format": "mlx"})
    weight_map = {n: files[i % 2].name for i, n in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return files


# -- facts -------------------------------------------------------------------------------------------------------------


def test_facts_of_a_text_model(folder: Path) -> None:
    profile = read_profile(folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    ids = {t["content"]: t["id"] for t in tokens}
    assert (profile.name, profile.model_type, profile.path) == ("model", "qwen3", folder)
    assert (profile.context_tokens, profile.vocab_size, profile.dtype) == (4096, 600, "float32")
    assert profile.eos_token_ids == (ids["<|im_end|>"], ids["<|endoftext|>"])
    assert profile.modalities == {"text"} and not profile.is_multimodal
    assert profile.generation_defaults == {"temperature": 0.7, "top_p": 0.9}
    assert profile.chat_template is not None and "<|im_start|>" in profile.special_tokens
    assert profile.weights_bytes == profile.num_parameters * 4


def test_parameters_of_a_quantised_model_are_counted_unpacked(tiny_model: Tiny) -> None:
    plain, packed = read_profile(tiny_model("qwen3")), read_profile(tiny_model("qwen3", quantize_bits=4))
    assert packed.num_parameters == plain.num_parameters
    assert packed.weights_bytes < plain.weights_bytes / 3
    assert packed.quantization is not None and packed.quantization["bits"] == 4


def test_reading_a_profile_imports_no_model_library() -> None:
    code = "import sys, vllm_mlx.models.profile; print([m for m in ('mlx', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_end_tokens_of_all_files_are_joined(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=7)
    edit(folder / "generation_config.json", eos_token_id=[5, 6])
    profile = read_profile(folder)
    assert {5, 6, 7} < set(profile.eos_token_ids)
    assert len(profile.eos_token_ids) == 4, "the tokenizer's own comes last"


def test_a_turn_end_that_no_file_lists_still_ends_the_turn(folder: Path) -> None:
    edit(folder / "config.json", eos_token_id=5)
    edit(folder / "generation_config.json", eos_token_id=None)
    edit(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    profile = read_profile(folder)
    tokens = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert next(t["id"] for t in tokens if t["content"] == "<|im_end|>") in profile.eos_token_ids
    assert any("<|im_end|>" in note for note in profile.notes)


def test_defaults_of_a_model_that_does_not_sample_are_inert(folder: Path) -> None:
    edit(folder / "generation_config.json", do_sample=False, repetition_penalty=1.1)
    assert read_profile(folder).generation_defaults == {"repetition_penalty": 1.1}


def test_a_missing_chat_template_is_none(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    assert read_profile(folder).chat_template is None


def test_chat_templates_are_found_wherever_they_are_kept(folder: Path) -> None:
    text = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    edit(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "x"}, {"name": "default", "template": text}],
    )
    assert read_profile(folder).chat_template == text
    edit(folder / "chat_template.json", chat_template="other")
    assert read_profile(folder).chat_template == "other"


def test_yarn_extends_the_context(folder: Path) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    edit(folder / "config.json", rope_scaling=scaling)
    assert read_profile(folder).context_tokens == 16384


def test_a_context_that_no_file_states_is_assumed_and_said(folder: Path) -> None:
    edit(folder / "config.json", max_position_embeddings=None)
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    profile = read_profile(folder)
    assert profile.context_tokens == 32768
    assert any("no context length" in note for note in profile.notes)


def test_gemma_states_no_context_and_is_known(folder: Path) -> None:
    edit(folder / "config.json", max_position_embeddings=None, model_type="gemma3")
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    assert read_profile(folder).context_tokens == 131_072


def test_a_vocabulary_that_no_config_states_is_read_from_the_embedding(folder: Path) -> None:
    edit(folder / "config.json", vocab_size=None)
    assert read_profile(folder).vocab_size == 600


def test_a_hub_snapshot_is_named_after_its_repository(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--Tiny-Qwen" / "snapshots" / "abc123"
    shutil.copytree(folder, snapshot)
    assert read_profile(snapshot).name == "org/Tiny-Qwen"


def test_the_fingerprint_follows_config_and_weights(folder: Path) -> None:
    first = read_profile(folder).fingerprint
    assert read_profile(folder).fingerprint == first
    edit(folder / "config.json", rope_theta=5e5)
    second = read_profile(folder).fingerprint
    assert second != first
    shard(folder)
    assert read_profile(folder).fingerprint not in (first, second)


def test_shards_are_counted_together(folder: Path) -> None:
    whole = read_profile(folder)
    shard(folder)
    profile = read_profile(folder)
    assert (profile.num_parameters, profile.weights_bytes) == (whole.num_parameters, whole.weights_bytes)


# -- modalities, from metadata -----------------------------------------------------------------------------------------


def modalities(profile: ModelProfile) -> set[str]:
    return set(profile.modalities)


def test_a_tower_with_weights_and_processor_is_multimodal(vlm_folder: Path) -> None:
    profile = read_profile(vlm_folder)
    assert profile.is_multimodal and modalities(profile) == {"text", "image", "video"}
    assert set(profile.media_token_ids) >= {"image", "video", "vision_start", "vision_end"}


def test_the_name_of_a_folder_decides_nothing(folder: Path, tmp_path: Path) -> None:
    named = shutil.copytree(folder, tmp_path / "Qwen3-VL-8B-Instruct")
    assert not read_profile(named).is_multimodal


def test_a_text_only_conversion_that_kept_its_vision_config_is_text(vlm_folder: Path) -> None:
    import mlx.core as mx

    weights = mx.load(str(vlm_folder / "model.safetensors"))
    text = {k: v for k, v in weights.items() if "vision" not in k}
    mx.save_safetensors(str(vlm_folder / "model.safetensors"), text, {"format": "mlx"})
    assert modalities(read_profile(vlm_folder)) == {"text"}


def test_a_tower_without_a_processor_is_text(vlm_folder: Path) -> None:
    (vlm_folder / "preprocessor_config.json").unlink()
    (vlm_folder / "video_preprocessor_config.json").unlink()
    assert modalities(read_profile(vlm_folder)) == {"text"}


# -- folders that cannot be served -------------------------------------------------------------------------------------


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        read_profile(folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    return message


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    assert "no model folder" in refusal(tmp_path / "nowhere")


def test_a_file_is_not_a_folder(folder: Path) -> None:
    assert "is a file" in refusal(folder / "model.safetensors")


def test_an_empty_folder_is_not_a_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_a_cut_config_is_named(folder: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text[: len(text) // 2])
    assert "config.json is not valid JSON" in refusal(folder)


def test_a_config_without_a_model_type_is_named(folder: Path) -> None:
    edit(folder / "config.json", model_type=None)
    assert "no model_type" in refusal(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    shard(folder)[1].unlink()
    message = refusal(folder)
    assert "1 of 2 weight files are missing" in message and "model-00002-of-00002" in message


def test_a_file_shorter_than_its_header_says_is_named(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cut short" in refusal(folder)


def test_a_file_of_a_few_bytes_is_named(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x00\x01")
    assert "cut short or not a safetensors file" in refusal(folder)


def test_a_damaged_header_is_named(folder: Path) -> None:
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[8:40] = b"\xff" * 32
    (folder / "model.safetensors").write_bytes(bytes(data))
    assert "damaged header" in refusal(folder)


def test_a_git_lfs_pointer_is_told_apart(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    assert "git lfs pull" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "cause"),
    [("pytorch_model.bin", "PyTorch weights only"), ("model.gguf", "GGUF"), ("x.incomplete", "finish the download")],
)
def test_weights_of_another_kind_are_told_apart(folder: Path, name: str, cause: str) -> None:
    (folder / "model.safetensors").rename(folder / name)
    assert cause in refusal(folder)


def test_no_weights_at_all_is_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "no *.safetensors" in refusal(folder)


def test_a_damaged_index_is_named(folder: Path) -> None:
    shard(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": [')
    assert "index.json is damaged" in refusal(folder)


def test_a_cut_tokenizer_is_named(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text[:1000])
    assert "tokenizer.json is not valid JSON" in refusal(folder)
