"""Builds the benchmark's own image model: a Qwen3-VL of random weights, the text model's with a small vision tower.

The language model and its tokenizer are `bench/model.py`'s; a picture of 256 x 256 pixels is 64 tokens of 256 patches.
Needs numpy; no MLX.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from vllm_mlx.bench.model import VOCAB, build

MEDIA = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% elif part.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% elif part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEPTH, HIDDEN, INNER, HEADS, PATCH, MERGE, SIDE = 8, 384, 1024, 6, 16, 2, 24
DEEPSTACK = (2, 5)
_FINISHED = "complete.json"
_RECIPE = {"format": 1, "depth": DEPTH, "hidden": HIDDEN, "inner": INNER}


def build_image_model(folder: Path, size: str = "30m") -> Path:
    """The model's folder; built unless it is there already."""
    out = folder / f"bench-qwen3-vl-{size}"
    finished = out / _FINISHED
    if finished.exists() and json.loads(finished.read_text()) == _RECIPE:
        return out
    source = build(folder, size)
    out.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(source, out)
    text = json.loads((source / "config.json").read_text())
    _write(out / "config.json", _config(text))
    shutil.copy(source / "generation_config.json", out)
    pixels = {"patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2,
              "size": {"shortest_edge": 32 * 32, "longest_edge": 768 * 768},
              "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    _write(out / "preprocessor_config.json", {
        **pixels, "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor"})
    _write(out / "video_preprocessor_config.json", {**pixels, "min_frames": 2})
    _save_weights(source, out, int(text["hidden_size"]))
    _write(finished, _RECIPE)
    return out


def _write_tokenizer(source: Path, out: Path) -> None:
    tokenizer = json.loads((source / "tokenizer.json").read_text())
    for number, name in enumerate(MEDIA):
        tokenizer["added_tokens"].append({
            "id": VOCAB + number, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False, "special": True})  # fmt: skip
    _write(out / "tokenizer.json", tokenizer)
    config = json.loads((source / "tokenizer_config.json").read_text())
    _write(out / "tokenizer_config.json", {**config, "chat_template": TEMPLATE})
    (out / "chat_template.jinja").write_text(TEMPLATE)


def _config(text: dict[str, Any]) -> dict[str, Any]:
    ids = {name: VOCAB + number for number, name in enumerate(MEDIA)}
    half = int(text["head_dim"]) // 2
    sections = [half - 2 * (half // 3), half // 3, half // 3]
    vocab = VOCAB + len(MEDIA)
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "vocab_size": vocab,
        "tie_word_embeddings": True,
        "eos_token_id": text["eos_token_id"],
        "pad_token_id": text["pad_token_id"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "text_config": {
            **{key: value for key, value in text.items() if key != "architectures"},
            "model_type": "qwen3_vl_text",
            "vocab_size": vocab,
            "rope_scaling": {
                "type": "default", "rope_type": "default", "mrope_section": sections, "mrope_interleaved": True
            },
        },
        "vision_config": {
            "model_type": "qwen3_vl", "depth": DEPTH, "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_heads": HEADS, "out_hidden_size": text["hidden_size"], "patch_size": PATCH,
            "spatial_patch_size": PATCH, "spatial_merge_size": MERGE, "temporal_patch_size": 2, "in_channels": 3,
            "num_position_embeddings": SIDE**2, "deepstack_visual_indexes": list(DEEPSTACK),
        },
    }  # fmt: skip


def _save_weights(source: Path, out: Path, hidden: int) -> None:
    from safetensors.numpy import load_file, save_file

    rng = np.random.default_rng(1)
    weights = {
        name.replace("model.", "model.language_model.", 1): array
        for name, array in load_file(source / "model.safetensors").items()
    }
    embedding = weights["model.language_model.embed_tokens.weight"]
    silent = np.zeros((len(MEDIA), embedding.shape[1]), np.float32)
    weights["model.language_model.embed_tokens.weight"] = np.concatenate([embedding, silent])

    def linear(name: str, rows: int, columns: int) -> None:
        scale = np.float32(columns**-0.5)
        weights[f"model.visual.{name}.weight"] = rng.standard_normal((rows, columns), dtype=np.float32) * scale
        weights[f"model.visual.{name}.bias"] = np.zeros(rows, np.float32)

    def norm(name: str, length: int) -> None:
        weights[f"model.visual.{name}.weight"] = np.ones(length, np.float32)
        weights[f"model.visual.{name}.bias"] = np.zeros(length, np.float32)

    for layer in range(DEPTH):
        block = f"blocks.{layer}"
        linear(f"{block}.attn.qkv", 3 * HIDDEN, HIDDEN)
        linear(f"{block}.attn.proj", HIDDEN, HIDDEN)
        linear(f"{block}.mlp.linear_fc1", INNER, HIDDEN)
        linear(f"{block}.mlp.linear_fc2", HIDDEN, INNER)
        norm(f"{block}.norm1", HIDDEN)
        norm(f"{block}.norm2", HIDDEN)
    joined = HIDDEN * MERGE**2
    for merger in ("merger", *(f"deepstack_merger_list.{i}" for i in range(len(DEEPSTACK)))):
        linear(f"{merger}.linear_fc1", joined, joined)
        linear(f"{merger}.linear_fc2", hidden, joined)
        norm(f"{merger}.norm", HIDDEN if merger == "merger" else joined)
    linear("patch_embed.proj", HIDDEN, 3 * 2 * PATCH * PATCH)
    flat = weights["model.visual.patch_embed.proj.weight"]
    weights["model.visual.patch_embed.proj.weight"] = flat.reshape(HIDDEN, 3, 2, PATCH, PATCH)
    weights["model.visual.pos_embed.weight"] = rng.standard_normal((SIDE**2, HIDDEN), dtype=np.float32)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
