"""Whisper, a few tokens at a time: transcription as an iterator that gives the MLX thread back between slices.

The network, the tokenizer and the alignment of words are mlx-audio's. The loop over windows and tokens is ours, because
the library's computes a whole clip before it returns; so are the rules for timestamps, which in 0.6.2 may go backwards.
What the loop does is OpenAI's reference (whisper/transcribe.py): windows of 30 s that begin where the last one's speech
ended, higher temperatures where a result looks wrong, silence skipped, earlier text as the prompt. MLX thread only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_audio.stt.models.whisper.audio import HOP_LENGTH, N_FRAMES, N_SAMPLES, log_mel_spectrogram, pad_or_trim
from mlx_audio.stt.models.whisper.decoding import (
    ApplyTimestampRules,
    DecodingOptions,
    DecodingTask,
    compression_ratio,
)
from mlx_audio.stt.models.whisper.timing import add_word_timestamps

from .sound import SAMPLE_RATE, Heard, Language, Segment, TranscribeOptions, Word

TEMPERATURES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
# The reference's thresholds: repetitive, improbable, silent.
MAX_COMPRESSION_RATIO, MIN_AVG_LOGPROB, SILENCE_PROB = 2.4, -1.0, 0.6
# Text made at a higher temperature than this is no good prompt.
MAX_PROMPT_TEMPERATURE = 0.5


@dataclass(frozen=True)
class Decoded:
    """A window's tokens, timestamps among them, and what the model thought of them."""

    token_ids: list[int]
    text: str
    temperature: float
    avg_logprob: float
    no_speech_prob: float

    @property
    def is_silence(self) -> bool:
        return self.no_speech_prob > SILENCE_PROB and self.avg_logprob <= MIN_AVG_LOGPROB

    @property
    def looks_wrong(self) -> bool:
        if self.no_speech_prob > SILENCE_PROB and self.avg_logprob < MIN_AVG_LOGPROB:
            return False
        return compression_ratio(self.text) > MAX_COMPRESSION_RATIO or self.avg_logprob < MIN_AVG_LOGPROB


def transcribe(
    model: Any,
    audio: np.ndarray,
    options: TranscribeOptions,
    slice_s: float,
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Heard]:
    """Segments of `audio` (mono, 16 kHz, float32). Each `next` takes about `slice_s`, or one pass of the encoder."""
    dtype = model.decoder.ln.weight.dtype
    num_frames = len(audio) // HOP_LENGTH
    language = options.language
    prompt: list[int] = []
    tokenizer = model.get_tokenizer(language=language)
    if options.prompt:
        prompt = tokenizer.encode(" " + options.prompt.strip())
    seek, last_word_end = 0, 0.0
    while seek < num_frames:
        size = min(N_FRAMES, num_frames - seek)
        mel = pad_or_trim(_mel(model, audio, seek)[:size], N_FRAMES, axis=-2).astype(dtype)
        features = model.encoder(mel[None])
        mx.eval(features)
        yield None
        if language is None:
            language = _detect(model, features)
            yield Language(language)
        task = "translate" if options.translates else "transcribe"
        tokenizer = model.get_tokenizer(language=language, task=task)
        decoded = None
        for temperature in TEMPERATURES if options.temperature == 0 else (options.temperature,):
            decoding = DecodingOptions(task=task, language=language, temperature=temperature, prompt=prompt)
            for step in _decode(model, features, decoding, slice_s, clock):
                if isinstance(step, Decoded):
                    decoded = step
                else:
                    yield None
            assert decoded is not None
            if not decoded.looks_wrong:
                break
        assert decoded is not None
        if decoded.is_silence:
            seek += size
            continue
        spans, advance = split(decoded.token_ids, tokenizer.timestamp_begin, size)
        segments = [_segment(tokenizer, span, seek) for span in spans]
        if options.has_words and segments:
            add_word_timestamps(
                segments=segments,
                model=model,
                tokenizer=tokenizer,
                mel=mel,
                num_frames=size,
                last_speech_timestamp=last_word_end,
            )
            ends = [word["end"] for segment in segments for word in segment["words"]]
            last_word_end = ends[-1] if ends else last_word_end
        seek += advance
        if decoded.temperature > MAX_PROMPT_TEMPERATURE:
            prompt = []
        for segment in segments:
            if segment["text"].strip() and segment["end"] > segment["start"]:
                if decoded.temperature <= MAX_PROMPT_TEMPERATURE:
                    prompt = prompt + segment["tokens"]
                yield _told(segment, decoded)
        yield None


def split(
    token_ids: Sequence[int], timestamp_begin: int, num_frames: int
) -> tuple[list[tuple[float, float, list[int]]], int]:
    """A window's tokens as (start s, end s, tokens) from the window's start, and the frames to the next window.

    Segments lie between pairs of timestamps. When the last one was not finished, the next window begins where it did.
    """
    is_time = [token >= timestamp_begin for token in token_ids]
    seconds_per_time = 2 * HOP_LENGTH / SAMPLE_RATE
    cuts = [i for i in range(1, len(token_ids)) if is_time[i - 1] and is_time[i]]
    ends_alone = is_time[-2:] == [False, True]

    def seconds(token: int) -> float:
        return (token - timestamp_begin) * seconds_per_time

    if not cuts:
        times = [token for token, timed in zip(token_ids, is_time, strict=True) if timed]
        end = num_frames * HOP_LENGTH / SAMPLE_RATE
        if times and times[-1] != timestamp_begin:
            end = seconds(times[-1])
        return ([(0.0, end, list(token_ids))] if token_ids else []), num_frames
    ends = [*cuts, len(token_ids)] if ends_alone else cuts
    spans, start = [], 0
    for end_index in ends:
        tokens = list(token_ids[start:end_index])
        spans.append((seconds(tokens[0]), seconds(tokens[-1]), tokens))
        start = end_index
    if ends_alone:
        return spans, num_frames
    advance = (token_ids[start - 1] - timestamp_begin) * 2
    # A window that ends where it began would never end.
    return spans, min(advance, num_frames) or num_frames


class TimestampRules:
    """Which tokens may follow, of one row: timestamps come in pairs around text, never go back, and come first.

    From OpenAI's whisper/decoding.py.
    """

    MAX_FIRST = 50  # the first within a second

    def __init__(self, tokenizer: Any, sample_begin: int) -> None:
        self._sample_begin = sample_begin
        self._begin: int = tokenizer.timestamp_begin
        self._eot: int = tokenizer.eot
        self._none: int = tokenizer.no_timestamps

    def apply(self, logits: mx.array, tokens: mx.array) -> mx.array:
        """(1, vocabulary) to the same, with what may not come at minus infinity."""
        said = tokens[0, self._sample_begin :].tolist()
        begin = self._begin
        mask = np.zeros(logits.shape[-1], np.float32)
        mask[self._none] = -np.inf
        is_time = bool(said) and said[-1] >= begin
        was_time = len(said) < 2 or said[-2] >= begin
        if is_time and was_time:
            mask[begin:] = -np.inf
        elif is_time:
            mask[: self._eot] = -np.inf
        if times := [token for token in said if token >= begin]:
            # The end of a segment may be the start of the next, but not its own.
            mask[begin : times[-1] + (0 if is_time and not was_time else 1)] = -np.inf
        if not said:
            mask[:begin] = -np.inf
            mask[begin + self.MAX_FIRST + 1 :] = -np.inf
        logits = logits + mx.array(mask)
        # Likelier any timestamp than the likeliest text: then a timestamp.
        any_time, best_text = mx.logsumexp(logits[:, begin:]), logits[:, :begin].max()
        text = mx.arange(logits.shape[-1]) < begin
        return mx.where(text & (any_time > best_text), -mx.inf, logits)


def _mel(model: Any, audio: np.ndarray, seek: int) -> mx.array:
    """(3000, bands): the spectrogram of the 30 s from frame `seek`, with silence behind the clip's end."""
    window = audio[seek * HOP_LENGTH : seek * HOP_LENGTH + N_SAMPLES]
    return log_mel_spectrogram(mx.array(window), n_mels=model.dims.n_mels, padding=N_SAMPLES)[:N_FRAMES]


def _detect(model: Any, features: mx.array) -> str:
    if not model.is_multilingual:
        return "en"
    _, probabilities = model.detect_language(features)
    return str(max(probabilities[0], key=probabilities[0].get))


def _decode(
    model: Any, features: mx.array, options: DecodingOptions, slice_s: float, clock: Callable[[], float]
) -> Iterator[Decoded | None]:
    """Tokens until the end of the text or the context; None at the end of a slice, the result at the end."""
    task = DecodingTask(model, options)
    rules = [
        TimestampRules(task.tokenizer, task.sample_begin) if isinstance(rule, ApplyTimestampRules) else rule
        for rule in task.logit_filters
    ]
    tokens = mx.array([task.initial_tokens])
    sum_logprobs = mx.zeros(1)
    no_speech, no_speech_id = mx.array([0.0]), task.tokenizer.no_speech
    until = clock() + slice_s
    for i in range(task.sample_len):
        every = task.inference.logits(tokens if i == 0 else tokens[:, -1:], features)
        if i == 0 and no_speech_id is not None:
            no_speech = mx.softmax(every[:, task.sot_index], axis=-1)[:, no_speech_id]
        logits = every[:, -1]
        for rule in rules:
            logits = rule.apply(logits, tokens)
        tokens, is_completed, sum_logprobs = task.decoder.update(tokens, logits, sum_logprobs)
        mx.eval(tokens, is_completed, sum_logprobs, no_speech)
        if is_completed.item() or tokens.shape[-1] >= task.n_ctx:
            break
        if clock() >= until:
            yield None
            until = clock() + slice_s
    token_ids: list[int] = tokens[0, task.sample_begin :].tolist()
    if task.tokenizer.eot in token_ids:
        token_ids = token_ids[: token_ids.index(task.tokenizer.eot)]
    yield Decoded(
        token_ids,
        task.tokenizer.decode(token_ids).strip(),
        options.temperature,
        sum_logprobs.item() / (len(token_ids) + 1),
        no_speech.item(),
    )


def _segment(tokenizer: Any, span: tuple[float, float, list[int]], seek: int) -> dict[str, Any]:
    """A segment as the word alignment wants it."""
    start, end, tokens = span
    offset = seek * HOP_LENGTH / SAMPLE_RATE
    text = tokenizer.decode([token for token in tokens if token < tokenizer.eot])
    return {"seek": seek, "start": offset + start, "end": offset + end, "tokens": tokens, "text": text, "words": []}


def _told(segment: dict[str, Any], decoded: Decoded) -> Segment:
    return Segment(
        start=round(segment["start"], 3),
        end=round(segment["end"], 3),
        text=segment["text"],
        token_ids=tuple(segment["tokens"]),
        seek=segment["seek"],
        temperature=decoded.temperature,
        avg_logprob=decoded.avg_logprob,
        compression_ratio=compression_ratio(decoded.text),
        no_speech_prob=decoded.no_speech_prob,
        words=tuple(Word(word["word"], word["start"], word["end"]) for word in segment["words"]),
    )
