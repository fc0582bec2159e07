"""Small models of random weights with every kind of cache, for the agent benchmark; built once and kept.

All share the tokenizer of the benchmark's own model, which is the one with plain attention.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from vllm_mlx.bench.model import VOCAB, build, silent_ids

_DENSE: dict[str, Any] = dict(
    hidden_size=256, num_hidden_layers=4, intermediate_size=768, num_attention_heads=4, num_key_value_heads=2,
    head_dim=64, rms_norm_eps=1e-6, vocab_size=VOCAB, max_position_embeddings=32768, rope_theta=1e6,
    tie_word_embeddings=True, eos_token_id=2, torch_dtype="float32",
)  # fmt: skip

CONFIGS: dict[str, dict[str, Any]] = {
    "window": dict(
        _DENSE, model_type="gemma3_text", num_hidden_layers=6, sliding_window=512, sliding_window_pattern=3,
        query_pre_attn_scalar=64, rope_local_base_freq=1e4,
    ),
    "hybrid": dict(
        _DENSE, model_type="qwen3_5", linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=64,
        linear_value_head_dim=64, linear_conv_kernel_dim=4, full_attention_interval=2,
        rope_parameters=dict(type="default", mrope_section=[4, 6, 6], rope_theta=1e6, partial_rotary_factor=0.5),
    ),
    "mla": dict(
        _DENSE, model_type="deepseek_v3", num_key_value_heads=4, moe_intermediate_size=256, n_routed_experts=4,
        n_shared_experts=1, num_experts_per_tok=2, first_k_dense_replace=1, kv_lora_rank=64, q_lora_rank=128,
        qk_rope_head_dim=32, qk_nope_head_dim=32, v_head_dim=64, n_group=1, topk_group=1, routed_scaling_factor=1.0,
    ),
}  # fmt: skip
KINDS = ("attention", *CONFIGS)


def build_kind(folder: Path, kind: str) -> Path:
    """The folder of the model with this kind of cache."""
    plain = build(folder, "5m")
    if kind == "attention":
        return plain
    out = folder / f"bench-agent-{kind}"
    config = json.dumps({**CONFIGS[kind], "format": 1}, indent=1)
    if (out / "complete.json").exists() and (out / "complete.json").read_text() == config:
        return out
    from vllm_mlx.models.random_model import write_weights  # imports MLX

    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(plain / name, out / name)
    (out / "config.json").write_text(config)
    write_weights(out, silent_ids(plain))
    (out / "complete.json").write_text(config)
    return out
