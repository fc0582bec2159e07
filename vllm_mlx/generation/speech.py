"""Speech to text and text to speech by models beside the chat, slice by slice. Event loop, but for decoding files.

Knows the models by the protocols below; `models.transcriber.TranscriberModel` and `models.speaker.SpeakerModel` fit.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation import audio_files
from vllm_mlx.generation.oneshot import OneShots
from vllm_mlx.models.sound import SAMPLE_RATE, Heard, Language, Segment, SpeakOptions, TranscribeOptions

# Names that clients of OpenAI send without knowing of ours: they stand for the model's first voice.
OPENAI_VOICES = frozenset(
    "alloy ash ballad cedar coral echo fable marin nova onyx sage shimmer verse".split()
)  # fmt: skip
MAX_PIECE = 300
_SENTENCE_END = re.compile(r"(?<=[.!?;:。！？；])\s+|\n+|(?<=[。！？；])")


class Transcriber(Protocol):
    @property
    def languages(self) -> Mapping[str, str]: ...
    @property
    def can_translate(self) -> bool: ...
    @property
    def has_words(self) -> bool: ...
    @property
    def start(self) -> Callable[[np.ndarray, TranscribeOptions, float], Iterator[Heard]]: ...


class Speaker(Protocol):
    @property
    def sample_rate(self) -> int: ...
    @property
    def voices(self) -> tuple[str, ...]: ...
    @property
    def start(self) -> Callable[[Sequence[str], SpeakOptions], Iterator[np.ndarray]]: ...


@dataclass(frozen=True, slots=True)
class Clip:
    """A decoded file: mono, 16 kHz."""

    samples: np.ndarray

    @property
    def seconds(self) -> float:
        return len(self.samples) / SAMPLE_RATE


@dataclass(eq=False)
class TranscriptionService:
    oneshots: OneShots
    model: Transcriber

    def check(self, options: TranscribeOptions) -> None:
        """Raise InvalidRequest for what this model cannot do."""
        languages = self.model.languages
        if options.language is not None and options.language not in languages:
            known = ", ".join(sorted(languages)) or "none: this model finds out by itself"
            raise InvalidRequest(
                f"'language' must be one of this model's codes ({known}).", param="language", code="invalid_value"
            )
        if options.translates and not self.model.can_translate:
            raise InvalidRequest(
                "This model does not translate; serve a multilingual Whisper.", param="model", code="invalid_value"
            )
        if options.has_words and not self.model.has_words:
            raise InvalidRequest(
                "This model tells no times of words; ask for 'segment'.",
                param="timestamp_granularities",
                code="invalid_value",
            )

    async def decode(self, data: bytes) -> Clip:
        return Clip(await self.oneshots.in_worker(lambda: audio_files.decode(data)))

    async def transcribe(self, clip: Clip, options: TranscribeOptions) -> AsyncGenerator[Language | Segment, None]:
        """The language, where it is known or found, then segments as they are heard."""
        if options.language is not None:
            yield Language(options.language)
        samples, slice_s = clip.samples, self.oneshots.slice_s
        async with aclosing(self.oneshots.iterate(lambda: self.model.start(samples, options, slice_s))) as heard:
            async for item in heard:
                if item is not None:
                    yield item


@dataclass(eq=False)
class SpeechService:
    oneshots: OneShots
    model: Speaker

    def voice(self, name: str | None) -> str | None:
        """The model's own voice for a name; raises InvalidRequest with those there are."""
        voices = self.model.voices
        if name in voices:
            return name
        if name is None or name in OPENAI_VOICES:
            return voices[0] if voices else None
        if not voices:
            return name
        shown = ", ".join(voices[:40])
        raise InvalidRequest(f"There is no voice '{name}'; there are: {shown}.", param="voice", code="invalid_value")

    async def speak(self, text: str, options: SpeakOptions) -> AsyncGenerator[np.ndarray, None]:
        """Sound of `text` as it is made."""
        parts = pieces(text)
        async with aclosing(self.oneshots.iterate(lambda: self.model.start(parts, options))) as sound:
            async for samples in sound:
                if len(samples):
                    yield samples


def pieces(text: str) -> list[str]:
    """A text cut at the ends of sentences; long ones between words, and words that are too long anywhere."""
    found = []
    for sentence in _SENTENCE_END.split(text):
        rest = sentence.strip()
        while len(rest) > MAX_PIECE:
            at = rest.rfind(" ", 0, MAX_PIECE)
            at = at if at > 0 else MAX_PIECE
            found.append(rest[:at])
            rest = rest[at:].strip()
        if rest:
            found.append(rest)
    return found
