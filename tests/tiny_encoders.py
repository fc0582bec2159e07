"""Tiny random-weight encoder folders (embedding models, rerankers), and a plain numpy BERT to compare them with."""

from __future__ import annotations

import importlib
import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from tests.tiny_models import CORPUS, VOCAB, make_tokenizer, randomize, save_weights, write_json

_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
    max_position_embeddings=64, type_vocab_size=2, layer_norm_eps=1e-12, pad_token_id=0, hidden_act="gelu",
)  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "xlm_roberta": dict(_BERT, max_position_embeddings=66, type_vocab_size=1, pad_token_id=1),
    "modernbert": dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, norm_eps=1e-5, pad_token_id=0, global_attn_every_n_layers=3, local_attention=16,
    ),
    "qwen3_embedding": dict(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, intermediate_size=64, max_position_embeddings=256, rms_norm_eps=1e-6, rope_theta=1e4,
        tie_word_embeddings=True,
    ),
}  # fmt: skip
MODEL_TYPES = {"xlm_roberta": "xlm-roberta", "qwen3_embedding": "qwen3"}


def build_embedder(name: str, out: Path, *, pooling: str = "mean") -> Path:
    """An embedding model in the sentence-transformers layout."""
    return _build(name, out, "Model", pooling=pooling)


def build_cross_encoder(name: str, out: Path, **config: Any) -> Path:
    """A one-label classifier of pairs."""
    return _build(name, out, "SequenceClassificationModel", **config)


def _build(name: str, out: Path, class_name: str, *, pooling: str | None = None, **more: Any) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    config = {"model_type": MODEL_TYPES.get(name, name), **CONFIGS[name], **more}
    if class_name != "Model":
        config |= {"architectures": ["TinyForSequenceClassification"], "num_labels": 1}
    if name == "qwen3_embedding":
        make_tokenizer(out)
    else:
        _word_pieces(out, config["pad_token_id"], max_tokens=64)
    write_json(out / "config.json", config)
    if pooling:
        (out / "1_Pooling").mkdir(exist_ok=True)
        write_json(out / "1_Pooling" / "config.json", {"pooling_mode": pooling})
    mx.random.seed(3)
    module = importlib.import_module(f"mlx_vlm.models.{name}")
    network = getattr(module, class_name)(module.ModelConfig.from_dict({**config, "model_type": name}))
    randomize(network)
    save_weights(network, out)
    return out


def _word_pieces(out: Path, pad_id: int, *, max_tokens: int) -> None:
    """A small BERT tokenizer: [CLS] a [SEP] b [SEP], with type ids."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if pad_id == 1:
        specials[:2] = ["[UNK]", "[PAD]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=VOCAB, special_tokens=specials))
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", tokenizer.token_to_id("[SEP]")), ("[CLS]", tokenizer.token_to_id("[CLS]"))
    )
    tokenizer.save(str(out / "tokenizer.json"))
    write_json(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": max_tokens, "pad_token": "[PAD]",
            "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
        },
    )  # fmt: skip


def build_qwen3_reranker(out: Path) -> Path:
    """A causal Qwen3 whose tokenizer has "yes" and "no" as single tokens."""
    from tests.tiny_models import build

    build("qwen3", out)
    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    value = json.loads(tokenizer.to_str())
    for word, unused in (("yes", "<|extra_0|>"), ("no", "<|extra_1|>")):
        for token in value["added_tokens"]:
            if token["content"] == unused:
                token["content"] = word
                token["single_word"] = True
    (out / "tokenizer.json").write_text(json.dumps(value))
    return out


def bert_reference(folder: Path, token_ids: list[int], type_ids: list[int] | None = None) -> np.ndarray:
    """Hidden states (tokens, size) of a BERT checkpoint in float64, written from the paper and not from mlx-vlm."""
    config = json.loads((folder / "config.json").read_text())
    weights = {
        key.removeprefix("bert."): np.array(value.astype(mx.float32), np.float64)
        for key, value in mx.load(str(folder / "model.safetensors")).items()
    }
    heads, eps = config["num_attention_heads"], config["layer_norm_eps"]

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    ids, types = np.array(token_ids), np.array(type_ids or [0] * len(token_ids))
    tables = [weights[f"embeddings.{kind}_embeddings.weight"] for kind in ("word", "position", "token_type")]
    x = norm(tables[0][ids] + tables[1][: len(ids)] + tables[2][types], "embeddings.LayerNorm")
    erf = np.vectorize(math.erf)
    for layer in range(config["num_hidden_layers"]):
        at = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{part}").reshape(len(ids), heads, -1).transpose(1, 0, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (scores / scores.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(len(ids), -1)
        x = norm(x + linear(mixed, f"{at}.attention.output.dense"), f"{at}.attention.output.LayerNorm")
        h = linear(x, f"{at}.intermediate.dense")
        h = 0.5 * h * (1 + erf(h / math.sqrt(2)))
        x = norm(x + linear(h, f"{at}.output.dense"), f"{at}.output.LayerNorm")
    return x


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
