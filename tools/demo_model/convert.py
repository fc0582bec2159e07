"""Turn trained weights into the shipped directory: `python -m tools.demo_model.convert RUN_DIR [--out DIR]`.

Names and shapes are Hugging Face's for `qwen3_vl`. The matrices of attention stay float32; the other large ones are stored in 8 bits with
float32 scales, MLX's own format, which mlx-vlm and mlx-lm read as it is. Needs MLX, not PyTorch.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

from . import chat
from . import tokenizer as bpe
from .place import DEMO
from .shape import CONFIGS, MERGE, PATCH, PIXELS, DemoConfig

LIMIT = 30_000_000
GROUP, BITS = 64, 8


def config(cfg: DemoConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    def token(text: str) -> int:
        found = tokenizer.token_to_id(text)
        assert found is not None, text
        return found

    end, pad = token("<|im_end|>"), token("<|endoftext|>")
    text = {
        "model_type": "qwen3_vl_text", "vocab_size": cfg.vocab_size, "hidden_size": cfg.hidden_size, "intermediate_size": cfg.intermediate_size,
        "num_hidden_layers": cfg.num_hidden_layers, "num_attention_heads": cfg.num_attention_heads, "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim, "hidden_act": "silu", "rms_norm_eps": cfg.rms_norm_eps, "attention_bias": False, "tie_word_embeddings": True,
        "max_position_embeddings": cfg.max_position_embeddings, "rope_theta": cfg.rope_theta, "eos_token_id": end, "pad_token_id": pad, "dtype": "float32",
        "rope_scaling": {"type": "default", "rope_type": "default", "mrope_section": list(cfg.mrope_section), "mrope_interleaved": True},
    }  # fmt: skip
    v = cfg.vision
    vision = {
        "model_type": "qwen3_vl", "depth": v.depth, "hidden_size": v.hidden_size, "intermediate_size": v.intermediate_size, "num_heads": v.num_heads,
        "out_hidden_size": cfg.hidden_size, "patch_size": v.patch_size, "spatial_patch_size": v.patch_size, "spatial_merge_size": v.spatial_merge_size,
        "temporal_patch_size": v.temporal_patch_size, "in_channels": v.in_channels, "num_position_embeddings": v.num_position_embeddings,
        "deepstack_visual_indexes": list(v.deepstack_visual_indexes), "hidden_act": "gelu_pytorch_tanh", "image_size": 256,
    }  # fmt: skip
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "dtype": "float32", "tie_word_embeddings": True,
        "vocab_size": cfg.vocab_size, "eos_token_id": [end, pad], "pad_token_id": pad,
        "image_token_id": token("<|image_pad|>"), "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"), "vision_end_token_id": token("<|vision_end|>"), "vision_token_id": token("<|vision_pad|>"),
        "text_config": text, "vision_config": vision, "quantization": {"group_size": GROUP, "bits": BITS, "mode": "affine"},
    }  # fmt: skip


def write(name: str, out: Path, value: dict[str, Any]) -> None:
    (out / name).write_text(json.dumps(value, indent=1) + "\n")


def packed(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights as stored: large matrices in 8 bits, save those of attention and what the groups do not divide."""
    out: dict[str, mx.array] = {}
    for name, stored in weights.items():
        w = stored.astype(mx.float32)
        if w.ndim == 2 and w.shape[1] % GROUP == 0 and "self_attn" not in name and "pos_embed" not in name:
            base = name.removesuffix("weight")
            out[name], out[base + "scales"], out[base + "biases"] = mx.quantize(w, GROUP, BITS)
        else:
            out[name] = w
    return out


def convert(weights: dict[str, mx.array], cfg: DemoConfig, out: Path) -> int:
    """Write the directory and return the size of the weights in bytes."""
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    bpe.save(tokenizer, out, chat.TEMPLATE.read_text())
    full = config(cfg, tokenizer)
    write("config.json", out, full)
    write("generation_config.json", out, {"eos_token_id": full["eos_token_id"], "pad_token_id": full["pad_token_id"], "do_sample": False})
    picture = {
        "image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen3VLProcessor", "size": {"shortest_edge": PIXELS, "longest_edge": PIXELS},
        "min_pixels": PIXELS, "max_pixels": PIXELS, "patch_size": PATCH, "merge_size": MERGE, "temporal_patch_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    write("preprocessor_config.json", out, picture)
    mx.save_safetensors(str(out / "model.safetensors"), packed(weights), metadata={"format": "mlx"})
    (out / "model.safetensors").chmod(0o644)
    return (out / "model.safetensors").stat().st_size


def load(path: Path) -> tuple[dict[str, mx.array], DemoConfig]:
    """Read what `train` saved, or say in one line what is wrong with it."""
    if not path.is_file():
        sys.exit(f"convert: no {path.name} in {path.parent}")
    try:
        weights, about = mx.load(str(path), return_metadata=True)
    except RuntimeError:
        sys.exit(f"convert: {path} is no safetensors file")
    if about.get("config") not in CONFIGS:
        sys.exit(f"convert: {path} is of an unknown config {about.get('config')}")
    if any(not mx.issubdtype(w.dtype, mx.floating) for w in weights.values()):
        sys.exit(f"convert: {path} holds weights that are no floats")
    return weights, CONFIGS[about["config"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="the --out folder of the training")
    parser.add_argument("--out", type=Path, default=DEMO)
    args = parser.parse_args()
    weights, cfg = load(args.run / "average.safetensors")
    size = convert(weights, cfg, args.out)
    print(f"{args.out}: {size / 1e6:.1f} MB of weights")
    if size > LIMIT:
        sys.exit(f"convert: more than {LIMIT / 1e6:.0f} MB; choose a smaller config")


if __name__ == "__main__":
    main()
