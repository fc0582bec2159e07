"""Builds the benchmark's own model: a Qwen3 of 30 million random float32 weights that any MLX server can load.

The tokenizer is a byte-level BPE of 8192 entries trained on text made here, so that nothing is downloaded. Embedding
rows of special tokens and of pieces of characters are zero, hence their logits are: output neither ends early nor holds
half a character, and one token is one visible piece of text. Needs numpy and tokenizers; no MLX.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 8192
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ONSETS = "b c d f g h l m n p r s t v st tr pl gr".split()
SYLLABLES = [onset + vowel + coda for onset in _ONSETS for vowel in "aeiou" for coda in ("", "n", "r")]
_FINISHED = "complete.json"


@dataclass(frozen=True, slots=True)
class Size:
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


SIZES = {
    "5m": Size(256, 4, 4, 2, 64, 768),
    "30m": Size(512, 8, 8, 4, 64, 1536),
    "150m": Size(1024, 12, 16, 8, 64, 3072),
}


def make_vocabulary(count: int = 9000) -> list[str]:
    """Invented words, the same each time."""
    rng = random.Random(5)
    words = {"".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3)))) for _ in range(count)}
    return sorted(words)


def make_text(rng: random.Random, words: list[str], num_words: int) -> str:
    """Sentences of invented words. Frequent words come early in a shuffled list, as in a language."""
    text: list[str] = []
    for number in range(num_words):
        word = words[int(len(words) * rng.random() ** 3)]
        text.append(word.capitalize() if number % 12 == 0 else word + "." if number % 12 == 11 else word)
    return " ".join(text)


def build(folder: Path, size: str = "30m") -> Path:
    """The model's folder; built unless it is there already."""
    out = folder / f"bench-qwen3-{size}"
    recipe = {"format": 1, "size": size, **asdict(SIZES[size])}
    finished = out / _FINISHED
    if finished.exists() and json.loads(finished.read_text()) == recipe:
        return out
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer()
    tokenizer.save(str(out / "tokenizer.json"))
    _write_json(out / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "model_max_length": 32768, "clean_up_tokenization_spaces": False, "chat_template": TEMPLATE,
    })
    (out / "chat_template.jinja").write_text(TEMPLATE)
    _write_json(out / "config.json", _config(SIZES[size]))
    _write_json(out / "generation_config.json", {"eos_token_id": [2, 0], "pad_token_id": 0})
    _save_weights(out / "model.safetensors", SIZES[size], _silent_rows(tokenizer))
    _write_json(finished, recipe)
    return out


def _train_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    if tokenizer.get_vocab_size() != VOCAB:
        raise AssertionError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, not {VOCAB}")
    return tokenizer


def _corpus() -> Iterator[str]:
    rng = random.Random(6)
    words = make_vocabulary()
    rng.shuffle(words)
    yield " ".join(words)
    for _ in range(400):
        yield make_text(rng, words, 600)


def silent_ids(folder: Path) -> list[int]:
    """Ids that the built model in `folder` never generates."""
    return _silent_rows(Tokenizer.from_file(str(folder / "tokenizer.json")))


def _silent_rows(tokenizer: Tokenizer) -> list[int]:
    """Ids that must never be generated: special tokens, and bytes that are no character by themselves."""
    special = list(range(len(SPECIAL)))  # the trainer puts them first
    broken = [i for i in range(VOCAB) if i not in special and "\ufffd" in tokenizer.decode([i])]
    return special + broken


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": 2,
        "pad_token_id": 0,
        **asdict(size),
    }


def _save_weights(path: Path, size: Size, silent: list[int]) -> None:
    """Layer outputs outweigh the embedding they are added to, so that greedy text wanders instead of repeating."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng(0)

    def matrix(rows: int, columns: int, gain: float = 1.0) -> np.ndarray:
        return rng.standard_normal((rows, columns), dtype=np.float32) * np.float32(gain / columns**0.5)

    hidden, heads = size.hidden_size, size.num_attention_heads * size.head_dim
    kv_heads = size.num_key_value_heads * size.head_dim
    embedding = matrix(VOCAB, hidden, 2.0)
    embedding[silent] = 0
    weights = {"model.embed_tokens.weight": embedding, "model.norm.weight": np.ones(hidden, np.float32)}
    for layer in range(size.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for name, rows, columns, gain in (
            ("self_attn.q_proj", heads, hidden, 1.0),
            ("self_attn.k_proj", kv_heads, hidden, 1.0),
            ("self_attn.v_proj", kv_heads, hidden, 1.0),
            ("self_attn.o_proj", hidden, heads, 1.0),
            ("mlp.gate_proj", size.intermediate_size, hidden, 1.0),
            ("mlp.up_proj", size.intermediate_size, hidden, 1.0),
            ("mlp.down_proj", hidden, size.intermediate_size, 2.0),
        ):
            weights[f"{prefix}{name}.weight"] = matrix(rows, columns, gain)
        for name, length, value in (
            ("self_attn.q_norm", size.head_dim, 1.5),
            ("self_attn.k_norm", size.head_dim, 1.5),
            ("input_layernorm", hidden, 1.0),
            ("post_attention_layernorm", hidden, 1.0),
        ):
            weights[f"{prefix}{name}.weight"] = np.full(length, value, np.float32)
    save_file(weights, str(path), metadata={"format": "pt"})


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1))
