"""Audio files in and out: what is read, what is refused, how much, and sound through an encoder's pipe."""

from __future__ import annotations

import asyncio
import io
import os
import wave
from contextlib import aclosing

import numpy as np
import pytest

from vllm_mlx.errors import InvalidRequest, MissingPiece
from vllm_mlx.generation import audio_files
from vllm_mlx.generation.speech import MAX_PIECE, pieces


def tone(seconds: float, rate: int) -> np.ndarray:
    return (0.4 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def wav(seconds: float = 1.0, rate: int = 16_000, channels: int = 1) -> bytes:
    data = np.repeat(tone(seconds, rate), channels)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(channels)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(audio_files.pcm16(data))
    return file.getvalue()


@pytest.mark.parametrize(("rate", "channels"), [(16_000, 1), (44_100, 2), (8_000, 1), (48_000, 1)])
def test_wav_of_any_rate_becomes_mono_at_16_khz(rate, channels):
    samples = audio_files.decode(wav(1.0, rate, channels))
    assert samples.dtype == np.float32 and abs(len(samples) - 16_000) < 50
    # The same tone: as many crossings of zero.
    crossings = np.count_nonzero(np.diff(samples[100:-100] > 0))
    assert abs(crossings - 880) < 20 and 0.3 < np.abs(samples).max() < 0.5


def test_what_is_no_sound_is_an_error_of_the_file():
    good = wav()
    for data in (b"hello there, this is text", good[:30], b"ID3" + b"\0" * 300, good[:44], b"fLaC" + b"\xff" * 50):
        with pytest.raises(InvalidRequest) as caught:
            audio_files.decode(data)
        assert caught.value.param == "file" and caught.value.code == "invalid_audio"


def test_a_clip_is_bounded_while_it_is_decoded():
    with pytest.raises(InvalidRequest, match="longer than"):
        audio_files.decode(wav(3), max_clip_s=2)
    assert len(audio_files.decode(wav(2), max_clip_s=2)) == 32_000


@pytest.mark.parametrize(
    "head", [b"\0\0\0\x20ftypM4A ", b"\x1aE\xdf\xa3", b"OggS" + b"\0" * 24 + b"OpusHead", b"\xff\xf1\x50\x80"]
)
def test_other_kinds_are_ffmpegs_and_without_it_say_how_to_install_it(head, monkeypatch, tmp_path):
    assert audio_files.kind_of(head) == "ffmpeg"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingPiece, match="apt install ffmpeg"):
        audio_files.decode(head + b"\0" * 100)


def test_mp3_and_vorbis_are_known_by_their_first_bytes():
    for head in (b"\xff\xfb\x90\x00", b"ID3\x04", b"OggS" + b"\0" * 24 + b"\x01vorbis", b"fLaC"):
        assert audio_files.kind_of(head) == "miniaudio"


def fake_ffmpeg(folder, body: str) -> None:
    """A program of that name that is one, as far as pipes go."""
    script = folder / "ffmpeg"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(0o755)


def test_ffmpeg_is_given_the_file_by_a_pipe_and_no_other_way_in(monkeypatch, tmp_path):
    fake_ffmpeg(tmp_path, f'echo "$@" > {tmp_path}/arguments; cat > /dev/null; printf "\\0\\0\\0\\0\\0\\0\\200\\077"')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert audio_files.decode(b"\x1aE\xdf\xa3" + b"\0" * 99).tolist() == [0, 1]
    arguments = (tmp_path / "arguments").read_text()
    assert "-protocol_whitelist pipe" in arguments and "-i pipe:0" in arguments and "-nostdin" in arguments
    fake_ffmpeg(tmp_path, 'cat > /dev/null; echo "pipe:0: invalid data" >&2; exit 1')
    with pytest.raises(InvalidRequest, match="invalid data"):
        audio_files.decode(b"\x1aE\xdf\xa3" + b"\0" * 99)


async def sound(*parts: np.ndarray, error: Exception | None = None):
    for part in parts:
        yield part
    if error is not None:
        raise error


async def encoded(name: str, *parts: np.ndarray, rate: int = 24_000, error: Exception | None = None) -> bytes:
    return b"".join([data async for data in audio_files.Encoder(name, rate).encode(sound(*parts, error=error))])


async def test_a_streamed_wav_is_a_header_and_samples():
    data = await encoded("wav", tone(0.5, 24_000), tone(0.25, 24_000))
    assert data[:4] == b"RIFF" and data[8:12] == b"WAVE" and len(data) == 44 + 2 * 18_000
    assert abs(len(audio_files.decode(data)) - 12_000) < 50


async def test_pcm_is_24_khz_whatever_the_model_makes():
    assert len(await encoded("pcm", tone(1, 16_000), rate=16_000)) == pytest.approx(2 * 24_000, abs=8)
    loud = await encoded("pcm", np.array([2.0, -2.0, np.nan], np.float32))
    assert np.frombuffer(loud, "<i2").tolist() == [32767, -32767, 0]


async def test_sound_goes_through_ffmpeg_as_it_comes(monkeypatch, tmp_path):
    fake_ffmpeg(tmp_path, 'printf "head:"; cat')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    part = tone(0.5, 24_000)
    assert await encoded("mp3", part, part) == b"head:" + audio_files.pcm16(part) * 2
    with pytest.raises(RuntimeError, match="gone"):
        await encoded("flac", part, error=RuntimeError("gone"))


async def test_leaving_early_ends_ffmpeg(monkeypatch, tmp_path):
    fake_ffmpeg(tmp_path, f'echo $$ > {tmp_path}/pid; printf "head:"; exec cat > /dev/null')
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def endless():
        while True:
            yield tone(0.1, 24_000)
            await asyncio.sleep(0)

    async with aclosing(audio_files.Encoder("mp3", 24_000).encode(endless())) as data:
        assert await anext(data) == b"head:"
    pid = int((tmp_path / "pid").read_text())
    async with asyncio.timeout(10):
        while True:
            try:
                os.kill(pid, 0)
            except ProcessLookupError:
                break
            await asyncio.sleep(0.01)


async def test_formats_that_need_ffmpeg_say_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert audio_files.can_write("wav") and not audio_files.can_write("opus")
    with pytest.raises(MissingPiece, match="ask for 'wav' or 'pcm'"):
        audio_files.require_writer("opus")


def test_texts_are_spoken_sentence_by_sentence():
    assert pieces("Hello there. How are you?\n\nFine!") == ["Hello there.", "How are you?", "Fine!"]
    assert pieces("3.5 litres cost 2.40.") == ["3.5 litres cost 2.40."]
    assert pieces("今日は。元気ですか？はい") == ["今日は。", "元気ですか？", "はい"]
    long = "word " * 200
    assert "".join(pieces(long)).replace(" ", "") == long.replace(" ", "")
    assert all(len(piece) <= MAX_PIECE for piece in pieces(long + "x" * 1000))
    assert pieces(" \n ") == []
