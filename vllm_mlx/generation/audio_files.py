"""Audio files to samples and samples to audio files: miniaudio, and ffmpeg for what it does not know. Worker threads,
but for `Encoder`, which is the event loop's. No MLX.

Nothing of a file is trusted: what it decodes to is bounded while it is decoded, and ffmpeg reads from a pipe, so that a
file can name no other.
"""

from __future__ import annotations

import asyncio
import shutil
import struct
import subprocess
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass

import miniaudio
import numpy as np

from vllm_mlx.errors import InvalidRequest, MissingPiece
from vllm_mlx.models.sound import SAMPLE_RATE

MAX_CLIP_S = 2 * 3600
"""Longest clip that is decoded: about 450 MB of samples."""
INSTALL_FFMPEG = "install ffmpeg (`brew install ffmpeg`, `apt install ffmpeg`)"
FFMPEG_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Format:
    """How an answer's format is made: ffmpeg's arguments (empty: we write it ourselves) and its media type."""

    media_type: str
    arguments: tuple[str, ...] = ()


FORMATS = {
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm"),
    "mp3": Format("audio/mpeg", ("-f", "mp3", "-b:a", "128k")),
    "opus": Format("audio/ogg", ("-f", "ogg", "-c:a", "libopus", "-b:a", "64k")),
    "flac": Format("audio/flac", ("-f", "flac")),
    "aac": Format("audio/aac", ("-f", "adts", "-c:a", "aac", "-b:a", "128k")),
}
PCM_RATE = 24_000
"""OpenAI's pcm is 24 kHz, mono, signed 16-bit little-endian, without a header."""


def decode(data: bytes, *, max_clip_s: float = MAX_CLIP_S) -> np.ndarray:
    """Mono float32 samples at 16 kHz. Raises InvalidRequest for what is no audio, MissingPiece for want of ffmpeg."""
    kind = kind_of(data)
    if kind is None:
        raise InvalidRequest(
            "The file is not audio of a kind known here (wav, mp3, flac, ogg, m4a, mp4, webm, aac).",
            param="file",
            code="invalid_audio",
        )
    samples = _by_miniaudio(data, max_clip_s) if kind == "miniaudio" else _by_ffmpeg(data, max_clip_s)
    if len(samples) > max_clip_s * SAMPLE_RATE:
        raise InvalidRequest(
            f"The clip is longer than {max_clip_s / 60:g} minutes, the limit here; send it in parts.",
            param="file",
            code="invalid_audio",
        )
    if not len(samples):
        raise InvalidRequest("The file holds no sound.", param="file", code="invalid_audio")
    return samples


def kind_of(data: bytes) -> str | None:
    """Who can read a file, by its first bytes: "miniaudio", "ffmpeg" or nobody."""
    head = data[:64]
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE" or head[:3] == b"ID3" or head[:4] == b"fLaC":
        return "miniaudio"
    if head[:4] == b"OggS":
        return "miniaudio" if b"vorbis" in head else "ffmpeg"
    if head[4:8] == b"ftyp" or head[:4] == b"\x1aE\xdf\xa3" or head[:4] == b"FORM":
        return "ffmpeg"
    if len(head) > 2 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0:
        return "ffmpeg" if head[1] & 0x06 == 0 else "miniaudio"  # layer 0 is AAC's ADTS
    return None


def _by_miniaudio(data: bytes, max_clip_s: float) -> np.ndarray:
    limit = int(max_clip_s * SAMPLE_RATE)
    parts, total = [], 0
    try:
        stream = miniaudio.stream_memory(
            data, output_format=miniaudio.SampleFormat.FLOAT32, nchannels=1, sample_rate=SAMPLE_RATE
        )
        for part in stream:
            parts.append(np.frombuffer(part, np.float32))
            total += len(parts[-1])
            if total > limit:
                break
        stream.close()
    except miniaudio.MiniaudioError as error:
        raise InvalidRequest(
            "The audio file is damaged or of a form that cannot be read.", param="file", code="invalid_audio"
        ) from error
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _by_ffmpeg(data: bytes, max_clip_s: float) -> np.ndarray:
    ffmpeg = shutil.which("ffmpeg")
    if ffmpeg is None:
        raise MissingPiece(
            f"Audio of this kind is read by ffmpeg, which is not on this server; {INSTALL_FFMPEG}, or send wav, mp3, "
            "flac or ogg."
        )
    command = [ffmpeg, "-nostdin", "-v", "error", "-protocol_whitelist", "pipe", "-i", "pipe:0", "-vn"]
    command += ["-t", str(max_clip_s + 1), "-ac", "1", "-ar", str(SAMPLE_RATE), "-f", "f32le", "pipe:1"]
    try:
        result = subprocess.run(command, input=data, capture_output=True, timeout=FFMPEG_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise InvalidRequest("The audio file takes too long to decode.", param="file", code="invalid_audio") from error
    if result.returncode != 0:
        said = result.stderr.decode(errors="replace").strip().splitlines() or ["no reason given"]
        raise InvalidRequest(
            f"The audio file cannot be read ({said[-1][:200]}).", param="file", code="invalid_audio"
        )
    return np.frombuffer(result.stdout, np.float32)


def can_write(name: str) -> bool:
    return not FORMATS[name].arguments or shutil.which("ffmpeg") is not None


def require_writer(name: str) -> None:
    """Raise MissingPiece when a format cannot be written here."""
    if not can_write(name):
        raise MissingPiece(
            f"{name} is written by ffmpeg, which is not on this server; {INSTALL_FFMPEG}, or ask for 'wav' or 'pcm'."
        )


def resample(samples: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """Mono float32 samples at another rate."""
    if rate == wanted:
        return samples
    data = miniaudio.convert_frames(
        miniaudio.SampleFormat.FLOAT32, 1, rate, samples.astype(np.float32).tobytes(),
        miniaudio.SampleFormat.FLOAT32, 1, wanted,
    )  # fmt: skip
    return np.frombuffer(data, np.float32)


def pcm16(samples: np.ndarray) -> bytes:
    return (np.clip(np.nan_to_num(samples), -1, 1) * 32767).astype("<i2").tobytes()


def wav_header(rate: int, num_bytes: int | None = None) -> bytes:
    """The header of 16-bit mono sound; of unknown length, as streams have it, when `num_bytes` is None."""
    size = 0xFFFFFFFF - 36 if num_bytes is None else num_bytes
    fields = (b"RIFF", 36 + size, b"WAVE", b"fmt ", 16, 1, 1, rate, 2 * rate, 2, 16, b"data", size)
    return struct.pack("<4sI4s4sIHHIIHH4sI", *fields)


@dataclass(frozen=True)
class Encoder:
    """Samples as they come to the bytes of one format as they are ready. Event loop."""

    name: str
    rate: int

    async def encode(self, sound: AsyncIterator[np.ndarray]) -> AsyncGenerator[bytes, None]:
        """The file's bytes. Ends ffmpeg, where there is one, however it is left."""
        arguments = FORMATS[self.name].arguments
        if arguments:
            async with aclosing(self._piped(sound, arguments)) as piped:
                async for data in piped:
                    yield data
            return
        if self.name == "wav":
            yield wav_header(self.rate)
        async for samples in sound:
            yield pcm16(resample(samples, self.rate, PCM_RATE) if self.name == "pcm" else samples)

    async def _piped(self, sound: AsyncIterator[np.ndarray], arguments: tuple[str, ...]) -> AsyncGenerator[bytes, None]:
        require_writer(self.name)
        command = ["ffmpeg", "-v", "error", "-f", "s16le", "-ar", str(self.rate), "-ac", "1", "-i", "pipe:0"]
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, *arguments, "pipe:1", stdin=pipe, stdout=pipe, stderr=asyncio.subprocess.DEVNULL
        )
        assert process.stdin is not None and process.stdout is not None

        async def feed(stdin: asyncio.StreamWriter) -> None:
            try:
                async for samples in sound:
                    stdin.write(pcm16(samples))
                    await stdin.drain()
            finally:
                stdin.close()

        feeding = asyncio.create_task(feed(process.stdin))
        try:
            while data := await process.stdout.read(16_384):
                yield data
            await feeding  # raises what the sound's source raised
        finally:
            with suppress(ProcessLookupError):
                process.kill()
            feeding.cancel()
            await asyncio.wait([feeding])  # whoever closes the sound's source must find nobody in it
            await process.wait()
