"""Text-to-speech models of mlx-audio: pieces of text in, pieces of sound out. MLX thread only.

A slice is one piece of text (the caller keeps pieces to a sentence), or less where the model itself streams.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_audio.tts.utils import load_model

from ..errors import MissingPiece, ModelLoadError
from .sound import SpeakOptions

STREAMING_INTERVAL_S = 0.5
"""Seconds of sound in a piece, of models that stream by themselves."""
# Kokoro's voices are named by accent: American and British English, Spanish, French, Hindi, Italian, ...
KOKORO_ACCENTS = frozenset("abefhijpz")


@dataclass(frozen=True)
class SpeakerModel:
    """`start` takes pieces of text and gives float32 samples, mono, `sample_rate` a second. `voices` may be empty:
    then the model has none to choose from, or does not list them, and any name is handed on."""

    nbytes: int
    sample_rate: int
    voices: tuple[str, ...]
    start: Callable[[Sequence[str], SpeakOptions], Iterator[np.ndarray]]


def load_speaker(path: Path | str) -> SpeakerModel:
    """The text-to-speech model in folder `path`; raises ModelLoadError, one sentence."""
    path = Path(path)
    try:
        model = load_model(path)
    except ImportError as error:
        raise ModelLoadError(_missing(path.name, error)) from error
    except Exception as error:  # the boundary to a library that raises anything at all
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelLoadError(f"{path.name} cannot be loaded as a text-to-speech model ({line}).") from error
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    rate = getattr(model, "sample_rate", None) or getattr(getattr(model, "config", None), "sample_rate", None)
    return SpeakerModel(
        nbytes=nbytes,
        sample_rate=int(rate or 24_000),
        voices=voices_of(path),
        start=lambda pieces, options: speak(model, path.name, pieces, options),
    )


def speak(model: Any, name: str, pieces: Sequence[str], options: SpeakOptions) -> Iterator[np.ndarray]:
    """Sound of each piece in turn; raises MissingPiece for a package that the model needs for this text."""
    parameters = inspect.signature(model.generate).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    wanted: dict[str, Any] = {"voice": options.voice, "instruct": options.instructions}
    if options.speed != 1.0 or "speed" in parameters:
        wanted["speed"] = options.speed
    if "lang_code" in parameters and options.voice and options.voice[:1] in KOKORO_ACCENTS and "_" in options.voice:
        wanted["lang_code"] = options.voice[0]
    if "stream" in parameters:
        wanted |= {"stream": True, "streaming_interval": STREAMING_INTERVAL_S}
    given = {k: v for k, v in wanted.items() if v is not None and (takes_any or k in parameters)}
    try:
        for piece in pieces:
            for result in model.generate(text=piece, **given):
                yield np.array(result.audio.astype(mx.float32)).reshape(-1)
    except ImportError as error:
        raise MissingPiece(_missing(name, error)) from error


def voices_of(path: Path) -> tuple[str, ...]:
    """Names of the voices that a folder brings: files in `voices/`, or a list in config.json."""
    files = sorted({file.stem for file in (path / "voices").glob("*.*") if file.suffix in (".safetensors", ".npz")})
    if files:
        return tuple(files)
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ()
    for part in (config, config.get("talker_config") or {}):
        for key in ("voices", "speakers", "spk_id", "speaker_ids"):
            value = part.get(key) if isinstance(part, dict) else None
            if isinstance(value, dict | list) and value and all(isinstance(name, str) for name in value):
                return tuple(value)
    return ()


def _missing(name: str, error: ImportError) -> str:
    if error.name is None:  # the library says it in its own words
        return f"{name} cannot speak yet: {str(error).strip() or 'a package is missing'}"
    package = error.name.split(".")[0]
    return f"{name} needs the package {package}, which is not installed; install it with `pip install {package}`."
