"""What is known of a model before any weight is read: the facts of its folder, as frozen plain data.

`read_profile` reads JSON files and safetensors headers only: no MLX, no transformers, any thread. A folder that cannot
be served is a `ModelLoadError` whose one sentence names the cause and the remedy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import ModelLoadError
from . import token_facts
from .checkpoint import Checkpoint, read_checkpoint
from .json_file import read_json as read_json
from .modalities import media_token_ids, modalities

EMPTY: Mapping[str, Any] = MappingProxyType({})

# Names under which configs give the context length, most trustworthy first.
_CONTEXT_FIELDS = (
    "max_position_embeddings",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_positions",
    "n_ctx",
    "max_target_positions",
    "model_max_length",
)
_CONTEXT_WHEN_UNSTATED = 32_768
# Published checkpoints of these leave the length out, because it is their config class's default.
_CONTEXT_OF_TYPE = {"gemma2": 8_192, "gemma3": 131_072, "gemma3_text": 32_768, "gemma3n": 32_768}

_GENERATION_DEFAULTS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelProfile:
    """Facts of a model directory.

    `runs_batched` is False when the installed model code can compute one row at a time only, `interleaves` when a row
    must end before another begins, `shares_prefixes` when a prompt's beginning depends on what follows it,
    `scores_prompts` when its tokens get no probabilities; `notes` says why, and whatever else a person should know.
    `fingerprint` changes when config or weights change (for caches on disk).
    """

    name: str
    path: Path
    model_type: str
    architectures: tuple[str, ...] = ()
    context_tokens: int = _CONTEXT_WHEN_UNSTATED
    vocab_size: int = 0
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    is_multimodal: bool = False
    modalities: frozenset[str] = frozenset({"text"})
    weights_bytes: int = 0
    num_parameters: int = 0
    dtype: str = "float32"
    quantization: Mapping[str, Any] | None = None
    generation_defaults: Mapping[str, float] = field(default_factory=dict)
    chat_template: str | None = None
    special_tokens: tuple[str, ...] = ()
    media_token_ids: Mapping[str, int] = field(default_factory=dict)
    fingerprint: str = ""
    runs_batched: bool = True
    interleaves: bool = True
    shares_prefixes: bool = True
    scores_prompts: bool = True
    notes: tuple[str, ...] = ()


def read_profile(path: Path | str) -> ModelProfile:
    """Facts of the model in folder `path`. Checks that every weight file is there and whole."""
    path = Path(path)
    if not path.exists():
        raise ModelLoadError(f"There is no model folder at {path}; check the path, or give a Hugging Face model id.")
    if not path.is_dir():
        raise ModelLoadError(f"{path} is a file; give the folder that holds config.json and the weights.")
    config = read_json(path / "config.json")
    if not isinstance(config.get("model_type"), str) or not config["model_type"]:
        raise ModelLoadError(f"{path / 'config.json'} names no model_type; it is not the config of a language model.")
    checkpoint = read_checkpoint(path, quantization=_quantization(config) or EMPTY)
    generation = read_json(path / "generation_config.json", required=False)
    tokenizer_config = read_json(path / "tokenizer_config.json", required=False)
    token_ids, special_tokens = token_facts.named_tokens(path, tokenizer_config)
    chat_template = token_facts.chat_template(path, tokenizer_config)
    text_config = _text_config(config)
    notes: list[str] = []

    eos_token_ids = token_facts.eos_token_ids((generation, config, text_config), tokenizer_config, token_ids)
    if chat_template:
        for token in token_facts.TURN_ENDS:
            if token in chat_template and token in token_ids and token_ids[token] not in eos_token_ids:
                eos_token_ids = (*eos_token_ids, token_ids[token])
                notes.append(f"{token} ends a turn in the chat template and is treated as an end-of-sequence token")
    context_tokens, context_note = _context_tokens(config, text_config, tokenizer_config)
    if context_note:
        notes.append(context_note)
    kinds = modalities(path, config, checkpoint)

    return ModelProfile(
        name=_name(path),
        path=path,
        model_type=config["model_type"],
        architectures=tuple(config.get("architectures") or ()),
        context_tokens=context_tokens,
        vocab_size=_vocab_size(config, text_config, checkpoint),
        eos_token_ids=eos_token_ids,
        bos_token_id=token_facts.bos_token_id((generation, config, text_config), tokenizer_config, token_ids),
        is_multimodal=len(kinds) > 1,
        modalities=kinds,
        weights_bytes=checkpoint.num_bytes,
        num_parameters=checkpoint.num_parameters,
        dtype=checkpoint.dtype,
        quantization=_quantization(config),
        generation_defaults=_generation_defaults(generation),
        chat_template=chat_template,
        special_tokens=special_tokens,
        media_token_ids=media_token_ids(config, text_config),
        fingerprint=_fingerprint(path, checkpoint),
        notes=tuple(notes),
    )


def _name(path: Path) -> str:
    """`org/model` for a folder of the hub cache (models--org--model/snapshots/<hash>), else the folder's name."""
    resolved = path.resolve()
    for part in (resolved.parent.parent.name, resolved.name):
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/")
    return resolved.name


def _text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's part of a config: multimodal ones nest it."""
    for key in ("text_config", "llm_config", "language_config", "language_model_config"):
        nested = config.get(key)
        if isinstance(nested, dict) and nested:
            return nested
    thinker = config.get("thinker_config")
    if isinstance(thinker, dict):
        return _text_config(thinker)
    return config


def _quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    for part in (config, _text_config(config)):
        for key in ("quantization", "quantization_config"):
            value = part.get(key)
            if isinstance(value, dict) and value:
                return MappingProxyType(value)
    return None


def _context_tokens(
    config: Mapping[str, Any], text_config: Mapping[str, Any], tokenizer_config: Mapping[str, Any]
) -> tuple[int, str | None]:
    for part in (text_config, config):
        for key in _CONTEXT_FIELDS:
            value = part.get(key)
            if isinstance(value, int) and 0 < value < 1 << 40:
                return _extended_by_yarn(part, value), None
    value = tokenizer_config.get("model_max_length")
    if isinstance(value, int | float) and 0 < value < 1 << 30:
        return int(value), None
    known = _CONTEXT_OF_TYPE.get(str(config.get("model_type")))
    if known is not None:
        return known, None
    return _CONTEXT_WHEN_UNSTATED, f"config.json states no context length; {_CONTEXT_WHEN_UNSTATED} tokens are assumed"


def _extended_by_yarn(config: Mapping[str, Any], context_tokens: int) -> int:
    """YaRN configs state the trained length or the extended one; the larger is meant."""
    scaling = config.get("rope_scaling")
    if not isinstance(scaling, dict) or scaling.get("rope_type", scaling.get("type")) != "yarn":
        return context_tokens
    original, factor = scaling.get("original_max_position_embeddings"), scaling.get("factor")
    if not isinstance(original, int) or not isinstance(factor, int | float):
        return context_tokens
    return max(context_tokens, int(original * factor))


def _vocab_size(config: Mapping[str, Any], text_config: Mapping[str, Any], checkpoint: Checkpoint) -> int:
    """Rows of the output matrix: the config's word, else the embedding's shape."""
    for part in (text_config, config):
        value = part.get("vocab_size")
        if isinstance(value, int) and value > 0:
            return value
    for name, shape in checkpoint.shapes.items():
        if name.endswith(("embed_tokens.weight", "embeddings.weight", "wte.weight")) and shape:
            return shape[0]
    raise ModelLoadError("config.json states no vocab_size and no embedding was found; the model cannot be served.")


def _generation_defaults(generation: Mapping[str, Any]) -> Mapping[str, float]:
    """Sampling values the model's makers chose; `do_sample: false` makes all but the penalty inert (transformers)."""
    samples = generation.get("do_sample") is not False
    return MappingProxyType(
        {
            key: generation[key]
            for key in _GENERATION_DEFAULTS
            if isinstance(generation.get(key), int | float)
            and not isinstance(generation[key], bool)
            and (samples or key == "repetition_penalty")
        }
    )


def _fingerprint(path: Path, checkpoint: Checkpoint) -> str:
    digest = hashlib.blake2b((path / "config.json").read_bytes(), digest_size=16)
    for file in checkpoint.files:
        stat = file.stat()
        digest.update(f"{file.name}:{stat.st_size}:{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
