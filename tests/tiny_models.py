"""Builds tiny random-weight model folders that load like downloaded ones: `build("qwen3", folder)`.

A few hundred thousand float32 parameters each, a byte-level BPE tokenizer of 600 entries, a chat template. Weights are
drawn wide enough that the next token depends on the whole prompt: an error in a cache or a position changes the text.
"""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 600

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{% if c.type in ('image', 'image_url') %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c.type in ('video', 'video_url') %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif c.type == 'text' %}{{ c.text }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN_TOKENS = (
    "<|endoftext|> <|im_start|> <|im_end|> <|vision_start|> <|vision_end|> <|vision_pad|> <|image_pad|> <|video_pad|> "
    "<think> </think> <tool_call> </tool_call>"
).split()
CORPUS = [
    "The quick brown fox jumps over the lazy dog. Pack my box with five dozen liquor jugs. " * 20,
    '{"name": "get_weather", "arguments": {"city": "Paris", "unit": "celsius"}} ' * 20,
    "def add(a, b):\n    return a + b\n\nWhat is in this picture? A red circle on a white ground.\n" * 20,
]

_DENSE = dict(
    hidden_size=64, num_hidden_layers=4, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2,
    rms_norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=4096, rope_theta=1e4,
)  # fmt: skip
_LINEAR = dict(
    linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_conv_kernel_dim=4,
)  # fmt: skip
_MOE = dict(
    num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1, mlp_only_layers=[], moe_intermediate_size=32,
    norm_topk_prob=True,
)  # fmt: skip

TEXT: dict[str, dict[str, Any]] = {
    "llama": dict(_DENSE, tie_word_embeddings=False),
    "qwen2": dict(_DENSE, tie_word_embeddings=True),
    "qwen3": dict(_DENSE, tie_word_embeddings=True, head_dim=16),
    "qwen3_moe": dict(_DENSE, tie_word_embeddings=False, head_dim=16, **_MOE),
    "qwen3_next": dict(
        _DENSE, **_MOE, **_LINEAR, head_dim=16, full_attention_interval=2, shared_expert_intermediate_size=32,
        partial_rotary_factor=0.5, tie_word_embeddings=False,
    ),
    "qwen3_5": dict(
        _DENSE, **_LINEAR, head_dim=16, full_attention_interval=2, tie_word_embeddings=False,
        rope_parameters=dict(type="default", mrope_section=[1, 2, 1], rope_theta=1e4, partial_rotary_factor=0.5),
    ),
    "gemma3_text": dict(
        _DENSE, num_hidden_layers=6, head_dim=16, sliding_window=24, sliding_window_pattern=3,
        query_pre_attn_scalar=16, rope_local_base_freq=1e4,
    ),
    "gpt_oss": dict(
        _DENSE, head_dim=16, sliding_window=24, num_local_experts=4, num_experts_per_tok=2, intermediate_size=64,
        layer_types=["sliding_attention", "full_attention"] * 2, tie_word_embeddings=False,
    ),
    "deepseek_v3": dict(
        _DENSE, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, routed_scaling_factor=1.0,
    ),
    "mamba2": dict(
        vocab_size=VOCAB, num_heads=4, head_dim=32, hidden_size=64, intermediate_size=128, state_size=16,
        num_hidden_layers=3, layer_norm_epsilon=1e-5, conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True,
        tie_word_embeddings=False, time_step_limit=[0.0, 1e9], time_step_rank=4, ssm_state_size=16, expand=2,
        rms_norm=True, chunk_size=16,
    ),
    "falcon_h1": dict(
        _DENSE, head_dim=16, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=16, mamba_n_groups=1,
        mamba_d_conv=4, mamba_expand=1, tie_word_embeddings=False, rope_theta=1e4, lm_head_multiplier=1.0,
        embedding_multiplier=1.0, key_multiplier=1.0,
    ),
    "mimo": dict(_DENSE, tie_word_embeddings=False, num_nextn_predict_layers=1),
    "glm4_moe": dict(
        _DENSE, head_dim=16, moe_intermediate_size=32, norm_topk_prob=True, n_group=1, topk_group=1, n_shared_experts=1,
        n_routed_experts=4, routed_scaling_factor=1.0, num_experts_per_tok=2, first_k_dense_replace=1,
        rope_scaling=None, use_qk_norm=True, tie_word_embeddings=False, attention_bias=False,
        partial_rotary_factor=0.5,
    ),
    # Sparse attention over indexed keys, in a list of two caches.
    "deepseek_v32": dict(
        _DENSE, num_key_value_heads=4, moe_intermediate_size=32, n_routed_experts=4, n_shared_experts=1,
        num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=16, q_lora_rank=32, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=16, n_group=1, topk_group=1, routed_scaling_factor=1.0, index_head_dim=16,
        index_n_heads=2, index_topk=16, rope_scaling=None,
    ),
    # Attention over scores of five axes.
    "gemma2": dict(_DENSE, head_dim=16, query_pre_attn_scalar=16, sliding_window=4096),
    "lfm2": dict(
        _DENSE, norm_eps=1e-6, conv_bias=False, conv_L_cache=3, block_dim=64, block_ff_dim=96, block_multiple_of=32,
        block_ffn_dim_multiplier=1.0, block_auto_adjust_ff_dim=False, full_attn_idxs=[1, 3],
    ),
    # Keeps ChunkedKVCache, which no batch can hold.
    "llama4": dict(
        text_config=dict(
            _DENSE, model_type="llama4_text", head_dim=16, intermediate_size_mlp=128, attention_chunk_size=32,
            use_qk_norm=True, rope_scaling=None, attention_bias=False, interleave_moe_layer_step=2,
            num_local_experts=2, num_experts_per_tok=1,
        ),
    ),
}  # fmt: skip


def build(name: str, folder: Path | str, *, dtype: str = "float32", quantize_bits: int | None = None) -> Path:
    """Write the model called `name` into `folder` (made if needed) and return it."""
    out = Path(folder)
    out.mkdir(parents=True, exist_ok=True)
    if name in TEXT:
        _build_text(name, out, dtype, quantize_bits)
    else:
        from .tiny_vlms import build_vlm

        build_vlm(name, out)
    return out


def _build_text(name: str, out: Path, dtype: str, quantize_bits: int | None) -> None:
    from mlx_lm.utils import quantize_model

    ids = make_tokenizer(out)
    config = {"model_type": name, **TEXT[name], "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]}
    write_json(out / "config.json", config)
    write_json(
        out / "generation_config.json",
        {"eos_token_id": config["eos_token_id"], "do_sample": True, "temperature": 0.7, "top_p": 0.9},
    )
    mx.random.seed(1)
    module = importlib.import_module(f"mlx_lm.models.{name}")
    model = module.Model(module.ModelArgs.from_dict(config))
    randomize(model)
    if quantize_bits:
        model.set_dtype(getattr(mx, dtype))
        model, config = quantize_model(model, config, 32, quantize_bits)
        write_json(out / "config.json", config)
    save_weights(model, out, None if quantize_bits else dtype)


def make_tokenizer(
    out: Path,
    *,
    specials: list[str] = QWEN_TOKENS,
    tokenizer_class: str = "Qwen2Tokenizer",
    chat_template: str | None = CHATML,
    eos: str = "<|im_end|>",
    pad: str = "<|endoftext|>",
    extra: dict[str, Any] | None = None,
    specials_first: bool = False,
) -> dict[str, int]:
    """Train and save a byte-level BPE of exactly VOCAB entries; returns the special tokens' ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - (0 if specials_first else len(specials)), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=specials if specials_first else [],
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    missing = VOCAB - tokenizer.get_vocab_size()
    tokenizer.add_tokens([AddedToken(f"<|extra_{i}|>", normalized=False) for i in range(missing)])
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": tokenizer_class,
        "eos_token": eos,
        "pad_token": pad,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        **(extra or {}),
    }
    if chat_template:
        (out / "chat_template.jinja").write_text(chat_template)
    write_json(out / "tokenizer_config.json", config)
    return {s: tokenizer.token_to_id(s) for s in specials}


def randomize(model: Any) -> None:
    """Give every matrix of a model weights that keep activations near one; norms stay ones, other vectors as made."""
    arrays = []
    for name, array in tree_flatten(model.parameters()):
        if array.ndim > 1 and mx.issubdtype(array.dtype, mx.floating):
            fan_in = math.prod(array.shape[1:]) if "conv" in name or "patch_embed" in name else array.shape[-1]
            scale = 0.05 if "embed" in name and "proj" not in name else 1.6 / math.sqrt(fan_in)
            array = mx.random.normal(array.shape) * scale
        elif name.endswith("bias"):
            array = mx.random.normal(array.shape) * 0.1
        arrays.append((name, array))
    model.load_weights(arrays)


def save_weights(model: Any, out: Path, dtype: str | None = None) -> None:
    weights = dict(tree_flatten(model.parameters()))
    if dtype:
        weights = {k: v.astype(getattr(mx, dtype)) if v.dtype == mx.float32 else v for k, v in weights.items()}
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
