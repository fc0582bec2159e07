"""Speech-to-text models of mlx-audio as slices of work. MLX thread only.

Whisper is computed a few tokens at a time (`whisper.py`). Other families have no such seam: they are given windows of
the clip, cut where it is quiet, and one window is one slice.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_audio.stt.models.whisper import Model as Whisper
from mlx_audio.stt.models.whisper.tokenizer import LANGUAGES
from mlx_audio.stt.utils import load_model

from ..errors import ModelLoadError
from . import whisper
from .sound import SAMPLE_RATE, Heard, Language, Segment, TranscribeOptions

WINDOW_S = 20
QUIET_S = 0.1
SEARCH_S = 5


@dataclass(frozen=True)
class TranscriberModel:
    """`start` takes a clip (mono float32, 16 kHz), options and the seconds a slice may take.

    `languages` maps the codes that may be asked for to English names; empty when nothing may be asked for.
    """

    nbytes: int
    languages: Mapping[str, str]
    can_translate: bool
    has_words: bool
    start: Callable[[np.ndarray, TranscribeOptions, float], Iterator[Heard]]


def load_transcriber(path: Path | str) -> TranscriberModel:
    """The speech-to-text model in folder `path`; raises ModelLoadError, one sentence."""
    path = Path(path)
    try:
        model = load_model(path)
    except Exception as error:  # the boundary to a library that raises anything at all
        line = (str(error).strip() or type(error).__name__).splitlines()[0][:300]
        raise ModelLoadError(f"{path.name} cannot be loaded as a speech-to-text model ({line}).") from error
    if mx.default_device().type != mx.gpu:
        model.set_dtype(mx.float32)  # a CPU computes 16-bit floats in scalar code
    mx.eval(model.parameters())
    nbytes = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    if isinstance(model, Whisper):
        try:
            model.get_tokenizer()
        except ValueError as error:
            raise ModelLoadError(
                f"{path.name} has no tokenizer and preprocessor files (tokenizer.json, preprocessor_config.json); "
                "use a version that has, such as mlx-community/whisper-large-v3-turbo-asr-fp16."
            ) from error
        is_multilingual = bool(model.is_multilingual)
        return TranscriberModel(
            nbytes=nbytes,
            languages=LANGUAGES if is_multilingual else {"en": "english"},
            can_translate=is_multilingual,
            has_words=True,
            start=lambda audio, options, slice_s: whisper.transcribe(model, audio, options, slice_s),
        )
    return TranscriberModel(nbytes, {}, False, False, lambda audio, options, slice_s: windows(model, audio, options))


def windows(model: Any, audio: np.ndarray, options: TranscribeOptions) -> Iterator[Heard]:
    """Each window's text as one segment, or as the segments that the model tells."""
    parameters = inspect.signature(model.generate).parameters
    wanted = {"language": options.language, "temperature": options.temperature or None}
    given = {name: value for name, value in wanted.items() if value is not None and name in parameters}
    if options.language is not None:
        yield Language(options.language)
    start = 0
    while start < len(audio):
        end = quiet_end(audio, start)
        result = model.generate(mx.array(audio[start:end]), **given)
        offset, duration = start / SAMPLE_RATE, (end - start) / SAMPLE_RATE
        told = [s for s in getattr(result, "segments", None) or [] if isinstance(s, dict) and "start" in s]
        if told:
            for part in told:
                yield Segment(offset + part["start"], offset + part["end"], part.get("text", ""))
        elif text := str(getattr(result, "text", result)).strip():
            yield Segment(offset, offset + duration, " " + text)
        start = end
        yield None


def quiet_end(audio: np.ndarray, start: int) -> int:
    """Where a window that begins at `start` should end: at its quietest moment of the last seconds."""
    last = start + WINDOW_S * SAMPLE_RATE
    if last >= len(audio):
        return len(audio)
    first, grain = last - SEARCH_S * SAMPLE_RATE, int(QUIET_S * SAMPLE_RATE)
    loudness = np.square(audio[first:last].reshape(-1, grain)).mean(1)
    return first + int(loudness.argmin()) * grain + grain // 2

