"""Models beside the chat that compute with letters, behind the real services: no MLX, no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from vllm_mlx.generation.admission import Admission
from vllm_mlx.generation.encoding import EncodingService
from vllm_mlx.generation.oneshot import BesideModel, BesideModels, OneShots
from vllm_mlx.generation.speech import SpeechService, TranscriptionService
from vllm_mlx.models.sound import Heard, Language, Segment, SpeakOptions, TranscribeOptions, Word
from vllm_mlx.models.token_row import TokenRow


class LetterTokenizer:
    """A token is a letter's code; 1 stands before a text, 2 behind it."""

    def encode(self, text: str, *, truncation: bool = False, max_length: int = 0, **options: Any) -> list[int]:
        letters = [min(ord(c), 255) for c in text]
        if truncation:
            letters = letters[: max_length - 2]
        return [1, *letters, 2]

    def __call__(self, first: Any, second: Any = None, **options: Any) -> dict[str, Any]:
        if second is None:
            return {"offset_mapping": [(i, i + 1) for i in range(len(first))]}
        ids = [self.encode(a + "|" + b) for a, b in zip(first, second, strict=True)]
        return {"input_ids": [row[: options["max_length"]] for row in ids]}


@dataclass
class LetterEncoder:
    """Vectors count letters by their last two bits; scores count the letters a query shares with a document."""

    kind: str = "embedding"
    max_tokens: int = 32
    dimensions: int = 4
    has_sigmoid: bool = True
    tokenizer: Any = field(default_factory=LetterTokenizer)
    profile: Any = field(default_factory=lambda: SimpleNamespace(vocab_size=256))
    batches: list[int] = field(default_factory=list)

    def compute(self, rows: Sequence[TokenRow]) -> np.ndarray:
        self.batches.append(len(rows))
        if self.kind == "embedding":
            counts = np.array([[sum(t % 4 == k for t in row.token_ids) for k in range(4)] for row in rows], np.float32)
            return counts / np.linalg.norm(counts, axis=1, keepdims=True)
        texts = ["".join(map(chr, row.token_ids[1:-1])).partition("|") for row in rows]
        return np.array([len(set(a) & set(b)) - 2.0 for a, _, b in texts], np.float32)


class DirectEngine:
    """Jobs run where they are asked for. `before` is called with each job's number."""

    def __init__(self, before: Callable[[int], None] = lambda number: None) -> None:
        self.before = before
        self.num_jobs = 0

    async def call(self, job: Callable[[], Any]) -> Any:
        self.num_jobs += 1
        self.before(self.num_jobs)
        return job()


def make_oneshots(engine: Any = None, *, max_queue: int = 8, timeout_s: float = 30.0) -> OneShots:
    return OneShots(
        engine or DirectEngine(),
        Admission(max_running=1, max_queue=max_queue),
        timeout_s=timeout_s,
        stall_target_s=0.2,
    )


@dataclass
class ToneTranscriber:
    """Hears one segment for each second of a clip, named by its number and the options."""

    languages: dict[str, str] = field(default_factory=lambda: {"en": "english", "de": "german"})
    can_translate: bool = True
    has_words: bool = True
    fails_after: int | None = None
    closed: list[bool] = field(default_factory=list)

    def start(self, audio: np.ndarray, options: TranscribeOptions, slice_s: float) -> Iterator[Heard]:
        try:
            if options.language is None:
                yield Language("de")
            for i in range(math.ceil(len(audio) / 16_000)):
                yield None
                if i == self.fails_after:
                    raise RuntimeError("the device is gone")
                words = (Word(f"second {i}", i, i + 0.5),) if options.has_words else ()
                yield Segment(i, i + 0.9, f" second {i}", (i,), words=words)
        finally:
            self.closed.append(True)


@dataclass
class BeepSpeaker:
    """Says each letter of a piece as ten samples."""

    sample_rate: int = 24_000
    voices: tuple[str, ...] = ("anna", "bruno")
    error: Exception | None = None
    said: list[tuple[str, SpeakOptions]] = field(default_factory=list)

    def start(self, pieces: Sequence[str], options: SpeakOptions) -> Iterator[np.ndarray]:
        for piece in pieces:
            if self.error is not None and (self.said or not piece.startswith("ok")):
                raise self.error
            self.said.append((piece, options))
            yield np.full(10 * len(piece), 0.5, np.float32)


def audio(*, transcriber: Any = None, speaker: Any = None, oneshots: OneShots | None = None) -> dict:
    """Fields of a `ServerContext` with audio models."""
    oneshots = oneshots or make_oneshots()
    hears = TranscriptionService(oneshots, transcriber or ToneTranscriber())
    speaks = SpeechService(oneshots, speaker or BeepSpeaker())
    models = [BesideModel("test/ears", "transcription", hears, 10), BesideModel("test/mouth", "speech", speaks, 10)]
    return {"beside": BesideModels(models), "oneshots": oneshots}


def beside(oneshots: OneShots | None = None, *, embedding: bool = True, rerank: bool = True, **options: Any) -> dict:
    """Fields of a `ServerContext` with these models: `make_context(**beside())`."""
    oneshots = oneshots or make_oneshots()
    models = []
    if embedding:
        service = EncodingService(oneshots, LetterEncoder(), **options)
        models.append(BesideModel("test/embedder", "embedding", service, 100))
    if rerank:
        service = EncodingService(oneshots, LetterEncoder("cross-encoder"))
        models.append(BesideModel("test/ranker", "rerank", service, 50))
    return {"beside": BesideModels(models), "oneshots": oneshots}
