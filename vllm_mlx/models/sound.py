"""What crosses the border for speech: plain data, no MLX. Times are seconds from the clip's start."""

from __future__ import annotations

from dataclasses import dataclass

SAMPLE_RATE = 16_000
"""Samples a second of the mono float32 clips that are transcribed."""


@dataclass(frozen=True, slots=True)
class TranscribeOptions:
    """`language` is a code such as "en", or None to find out. `temperature` 0 starts greedy and rises where the model's
    own doubts ask for it; `prompt` is text that might have come before."""

    language: str | None = None
    translates: bool = False
    prompt: str | None = None
    temperature: float = 0.0
    has_words: bool = False


@dataclass(frozen=True, slots=True)
class Word:
    word: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of speech. The numbers are what the model thought of it, where it says."""

    start: float
    end: float
    text: str
    token_ids: tuple[int, ...] = ()
    seek: int = 0
    temperature: float = 0.0
    avg_logprob: float = 0.0
    compression_ratio: float = 0.0
    no_speech_prob: float = 0.0
    words: tuple[Word, ...] = ()


@dataclass(frozen=True, slots=True)
class Language:
    """The language that is spoken, told once, before the first segment."""

    code: str


Heard = Language | Segment | None
"""What a slice of a transcription gives; None when it has nothing to tell yet."""


@dataclass(frozen=True, slots=True)
class SpeakOptions:
    voice: str | None = None
    speed: float = 1.0
    instructions: str | None = None
