"""What a model takes beside text, decided from metadata and never from a name: config, weight names, processors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .checkpoint import Checkpoint

# Config fields that announce an encoder.
_VISION_FIELDS = frozenset(
    {
        *("vision_config", "vision_tower", "mm_vision_tower", "visual", "vit_config", "img_processor"),
        *("vision_backbone", "vision_lora"),
    }
)
_AUDIO_FIELDS = frozenset({"audio_config", "audio_processor", "speech_config"})

# Model types that have an encoder whatever the config says, and whose processor needs no file of its own.
_SELF_EVIDENT = frozenset({"moondream1", "moondream2", "moondream3", "phi4-siglip"})

# Parts of weight names that only an encoder has.
_VISION_WEIGHTS = ("vision", "visual", "image_newline", "vit.", "siglip", "image_encoder", "patch_embed")
_AUDIO_WEIGHTS = ("audio", "speech_encoder")

_MEDIA_TOKEN_FIELDS = {
    "image": ("image_token_id", "image_token_index", "img_context_token_id", "media_placeholder_token_id"),
    "video": ("video_token_id", "video_token_index"),
    "audio": ("audio_token_id", "audio_token_index"),
    "vision_start": ("vision_start_token_id", "boi_token_index", "boi_token_id"),
    "vision_end": ("vision_end_token_id", "eoi_token_index", "eoi_token_id"),
}


def modalities(path: Path, config: Mapping[str, Any], checkpoint: Checkpoint) -> frozenset[str]:
    """What the model takes, from metadata: an encoder in the config, its weights, a processor file beside them.

    All three are asked: text-only conversions keep a multimodal config, and some text models keep processor files.
    """
    kinds = {"text"}
    if config.get("model_type") in _SELF_EVIDENT and _has_weights(checkpoint.shapes, _VISION_WEIGHTS):
        return frozenset({"text", "image"})
    has_processor = any(
        (path / name).is_file()
        for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    )
    if not has_processor:
        return frozenset(kinds)
    declared = {key for part in _all_parts(config) for key, value in part.items() if value not in (None, {}, False)}
    names = checkpoint.shapes
    if declared & _VISION_FIELDS and _has_weights(names, _VISION_WEIGHTS):
        kinds.add("image")
        if "video_token_id" in declared or "video_token_index" in declared:
            kinds.add("video")
    if declared & _AUDIO_FIELDS and _has_weights(names, _AUDIO_WEIGHTS):
        kinds.add("audio")
    return frozenset(kinds)


def _all_parts(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield config
    thinker = config.get("thinker_config")
    if isinstance(thinker, dict):
        yield thinker


def _has_weights(names: Mapping[str, object], parts: tuple[str, ...]) -> bool:
    return any(part in name for name in names for part in parts)


def media_token_ids(config: Mapping[str, Any], text_config: Mapping[str, Any]) -> Mapping[str, int]:
    found: dict[str, int] = {}
    for kind, fields in _MEDIA_TOKEN_FIELDS.items():
        for part in (config, text_config):
            value = next((part[f] for f in fields if isinstance(part.get(f), int)), None)
            if value is not None:
                found.setdefault(kind, value)
    return MappingProxyType(found)
