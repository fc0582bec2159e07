"""Speech in and out over HTTP: forms as OpenAI's clients send them, every format, streams, bounds and errors."""

from __future__ import annotations

import base64
import json
import re

import httpx
import openai
import pytest

from tests.api.fake_beside import BeepSpeaker, ToneTranscriber, audio, make_oneshots
from tests.api.fakes import client_for, live_server, make_context
from tests.generation.test_audio_files import wav
from vllm_mlx.api.openai import subtitles
from vllm_mlx.errors import MissingPiece
from vllm_mlx.generation import audio_files
from vllm_mlx.models.sound import Segment
from vllm_mlx.settings import Settings


async def send(fields: dict, *, data: bytes | None = None, path: str = "transcriptions", **context) -> httpx.Response:
    files = {"file": ("clip.wav", wav(2.5) if data is None else data, "audio/wav")}
    async with client_for(make_context(**(context or audio()))) as client:
        return await client.post(f"/v1/audio/{path}", files=files, data={"model": "whisper-1", **fields})


async def test_a_clip_becomes_text():
    answer = (await send({})).json()
    assert answer == {"text": "second 0 second 1 second 2", "usage": {"type": "duration", "seconds": 3}}
    plain = await send({"response_format": "text"})
    assert plain.text == "second 0 second 1 second 2\n" and plain.headers["content-type"].startswith("text/plain")


async def test_verbose_json_has_segments_and_the_language_that_was_found():
    answer = (await send({"response_format": "verbose_json"})).json()
    assert answer["task"] == "transcribe" and answer["language"] == "german" and answer["duration"] == 2.5
    assert [(s["id"], s["start"], s["end"], s["text"]) for s in answer["segments"]] == [
        (i, i, i + 0.9, f" second {i}") for i in range(3)
    ]
    assert {"seek", "tokens", "temperature", "avg_logprob", "compression_ratio", "no_speech_prob"} < set(
        answer["segments"][0]
    )
    assert "words" not in answer
    given = (await send({"response_format": "verbose_json", "language": "English"})).json()
    assert given["language"] == "english"


async def test_words_come_when_asked_for():
    fields = {"response_format": "verbose_json", "timestamp_granularities[]": ["word"]}
    answer = (await send(fields)).json()
    assert answer["words"][1] == {"word": "second 1", "start": 1, "end": 1.5} and "segments" not in answer
    both = (await send({**fields, "timestamp_granularities[]": ["word", "segment"]})).json()
    assert both["words"] and both["segments"]


SRT_TIME = re.compile(r"(\d\d):([0-5]\d):([0-5]\d),(\d{3})")
VTT_TIME = re.compile(r"(\d\d):([0-5]\d):([0-5]\d)\.(\d{3})")


def check_cues(blocks: list[str], time: re.Pattern, *, is_numbered: bool) -> list[str]:
    """Every cue well-formed, its times in order; returns the texts."""
    texts, latest = [], 0
    for number, block in enumerate(blocks, 1):
        lines = block.split("\n")
        if is_numbered:
            assert lines.pop(0) == str(number)
        start, end = lines[0].split(" --> ")
        h, m, s, ms = map(int, time.fullmatch(start).groups())
        started = ((h * 60 + m) * 60 + s) * 1000 + ms
        h, m, s, ms = map(int, time.fullmatch(end).groups())
        assert latest <= started < ((h * 60 + m) * 60 + s) * 1000 + ms
        latest = started
        assert len(lines) == 2 and lines[1].strip() and "-->" not in lines[1]
        texts.append(lines[1])
    return texts


async def test_srt_and_vtt_are_valid():
    answer = await send({"response_format": "srt"})
    assert check_cues(answer.text.rstrip("\n").split("\n\n"), SRT_TIME, is_numbered=True) == [
        f"second {i}" for i in range(3)
    ]
    answer = await send({"response_format": "vtt"})
    head, *cues = answer.text.rstrip("\n").split("\n\n")
    assert head == "WEBVTT" and answer.headers["content-type"].startswith("text/vtt")
    assert len(check_cues(cues, VTT_TIME, is_numbered=False)) == 3


def test_subtitles_stay_valid_whatever_a_model_says():
    odd = [
        Segment(3599.9996, 3600.5, "past\nan hour"),
        Segment(5.0, 4.0, "back in time --> <b> & more"),
        Segment(7.0, 8.0, "  "),
        Segment(360_000.0, 360_001.0, "a hundred hours"),
    ]
    srt = subtitles.srt(odd).rstrip("\n").split("\n\n")
    wide = re.compile(r"(\d{2,}):([0-5]\d):([0-5]\d),(\d{3})")
    assert check_cues(srt, wide, is_numbered=True)[:2] == ["past an hour", "back in time -> <b> & more"]
    assert "01:00:00,000 --> " in srt[0] and "&lt;b&gt; &amp; more" in subtitles.vtt(odd)
    assert subtitles.srt([]) == "" and subtitles.vtt([]) == "WEBVTT\n"


async def test_a_stream_tells_text_as_it_is_heard():
    answer = await send({"stream": "true"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["transcript.text.delta"] * 3 + ["transcript.text.done"]
    assert "".join(event.get("delta", "") for event in events) == events[-1]["text"] == "second 0 second 1 second 2"


async def test_a_failure_in_mid_stream_is_an_event_and_ends_the_model():
    model = ToneTranscriber(fails_after=1)
    answer = await send({"stream": "true"}, **audio(transcriber=model))
    assert answer.status_code == 200 and '"type":"error"' in answer.text and "device is gone" not in answer.text
    assert "transcript.text.done" not in answer.text and model.closed == [True]
    assert (await send({}, **audio(transcriber=ToneTranscriber(fails_after=0)))).status_code == 500


async def test_translations_are_english():
    answer = await send({"response_format": "verbose_json"}, path="translations")
    assert answer.json()["task"] == "translate" and answer.json()["language"] == "english"
    refused = await send({}, path="translations", **audio(transcriber=ToneTranscriber(can_translate=False)))
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "model"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": "docx"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "2"}, "temperature"),
        ({"stream": "perhaps"}, "stream"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
        ({"language": "xx"}, "language"),
        ({"timestamp_granularities[]": "line"}, "timestamp_granularities.0"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"model": "test/mouth"}, "model"),
    ],
)
async def test_a_wrong_form_field_is_named(fields, param):
    answer = await send(fields)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param


async def test_the_file_is_needed_whole_and_small_enough():
    for data in (b"", b"this is no sound", wav()[:40]):
        for stream in ("false", "true"):
            answer = await send({"stream": stream}, data=data)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "file"
    small = {**audio(), "settings": Settings().with_values(beside__max_audio_upload_mb=0.05)}
    answer = await send({}, **small)
    assert answer.status_code == 413 and "--max-audio-upload-mb" in answer.json()["error"]["message"]
    async with client_for(make_context(**audio())) as client:
        for request in (
            {"json": {"model": "x"}},
            {"data": {"model": "x"}},
            {"content": b"--x\r\nbroken", "headers": {"content-type": "multipart/form-data; boundary=x"}},
            {"content": b"", "headers": {"content-type": "multipart/form-data"}},
            {"files": {"other": ("a", b"b")}},
            {"files": [("file", ("a", wav())), ("file", ("b", wav()))]},
        ):
            answer = await client.post("/v1/audio/transcriptions", **request)
            assert answer.status_code == 400 and answer.json()["error"]["message"], request


async def test_a_server_without_the_models_names_the_flags():
    nothing = {"oneshots": make_oneshots()}
    assert "--stt-model" in (await send({}, **nothing)).json()["error"]["message"]
    async with client_for(make_context(**nothing)) as client:
        answer = await client.post("/v1/audio/speech", json={"input": "a", "voice": "alloy"})
        assert answer.status_code == 404 and "--tts-model" in answer.json()["error"]["message"]
        assert (await client.get("/v1/audio/voices")).status_code == 404


async def say(body: dict, **context) -> httpx.Response:
    async with client_for(make_context(**(context or audio()))) as client:
        return await client.post("/v1/audio/speech", json={"model": "tts-1", "voice": "alloy", **body})


async def test_text_becomes_sound():
    speaker = BeepSpeaker()
    answer = await say({"input": "One. Two.", "response_format": "wav", "speed": 1.25}, **audio(speaker=speaker))
    assert answer.status_code == 200 and answer.headers["content-type"] == "audio/wav"
    assert len(answer.content) == 44 + 2 * 80 and answer.content[:4] == b"RIFF"
    assert [piece for piece, _ in speaker.said] == ["One.", "Two."]
    # OpenAI's names stand for the first voice of ours.
    assert speaker.said[0][1].voice == "anna" and speaker.said[0][1].speed == 1.25
    raw = await say({"input": "One.", "response_format": "pcm", "voice": {"id": "bruno"}})
    assert len(raw.content) == 80 and raw.headers["content-type"] == "audio/pcm"


async def test_without_a_format_it_is_mp3_or_what_the_server_can_make(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (await say({"input": "One."})).headers["content-type"] == "audio/wav"
    answer = await say({"input": "One.", "response_format": "mp3"})
    assert answer.status_code == 501 and "ffmpeg" in answer.json()["error"]["message"]
    monkeypatch.setattr(audio_files.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(audio_files.Encoder, "_piped", lambda self, sound, arguments: _mp3(sound))
    answer = await say({"input": "One."})
    assert answer.headers["content-type"] == "audio/mpeg" and answer.content == b"mp3"


async def _mp3(sound):
    async for _ in sound:
        yield b"mp3"


async def test_a_stream_of_events_holds_the_same_bytes():
    answer = await say({"input": "One. Two.", "response_format": "pcm", "stream_format": "sse"})
    events = [json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["speech.audio.delta"] * 2 + ["speech.audio.done"]
    data = b"".join(base64.b64decode(event["audio"]) for event in events[:-1])
    assert data == (await say({"input": "One. Two.", "response_format": "pcm"})).content


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": "  \n"}, "input"),
        ({"input": "x" * 5000}, "input"),
        ({"input": "a", "voice": "nobody"}, "voice"),
        ({"input": "a", "voice": 3}, "voice"),
        ({"input": "a", "speed": 9}, "speed"),
        ({"input": "a", "response_format": "midi"}, "response_format"),
        ({"input": "a", "stream_format": "smoke"}, "stream_format"),
        ({"input": "a", "model": "test/ears"}, "model"),
    ],
)
async def test_a_wrong_field_of_a_speech_request_is_named(body, param):
    answer = await say(body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].split(".")[0] == param


async def test_a_piece_that_is_missing_is_a_501_with_its_install_line():
    speaker = BeepSpeaker(error=MissingPiece("kokoro needs misaki; install it with `pip install misaki`."))
    answer = await say({"input": "a", "response_format": "wav"}, **audio(speaker=speaker))
    assert answer.status_code == 501 and "pip install misaki" in answer.json()["error"]["message"]


async def test_a_failure_after_the_first_sound_breaks_the_connection_off():
    context = make_context(**audio(speaker=BeepSpeaker(error=RuntimeError("gone"))))
    async with live_server(context) as address, httpx.AsyncClient() as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post(
                f"{address}/v1/audio/speech", json={"input": "ok. then not", "response_format": "wav"}
            )
    assert not len(context.live)


async def test_voices_are_listed():
    async with client_for(make_context(**audio())) as client:
        answer = (await client.get("/v1/audio/voices", params={"model": "any"})).json()
        told = (await client.get("/v1/capabilities")).json()["features"]
    assert answer == {"model": "test/mouth", "voices": [{"id": n, "name": n} for n in ("anna", "bruno")]}
    assert told["transcription"] and told["speech"] and not told["embeddings"]


async def test_the_sdk_hears_and_speaks():
    async with live_server(make_context(**audio())) as address:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            file = ("clip.wav", wav(2.5))
            heard = await client.audio.transcriptions.create(model="whisper-1", file=file)
            assert heard.text == "second 0 second 1 second 2"
            verbose = await client.audio.transcriptions.create(
                model="whisper-1",
                file=file,
                response_format="verbose_json",
                timestamp_granularities=["word", "segment"],
            )
            assert verbose.segments[2].start == 2 and verbose.words[2].word == "second 2" and verbose.duration == 2.5
            stream = await client.audio.transcriptions.create(model="whisper-1", file=file, stream=True)
            events = [event async for event in stream]
            assert events[-1].type == "transcript.text.done" and events[-1].text == heard.text
            assert isinstance(
                await client.audio.transcriptions.create(model="whisper-1", file=file, response_format="srt"), str
            )
            translated = await client.audio.translations.create(model="whisper-1", file=file)
            assert translated.text == heard.text
            async with client.audio.speech.with_streaming_response.create(
                model="tts-1", voice="alloy", input="Hello there.", response_format="wav"
            ) as spoken:
                data = b"".join([part async for part in spoken.iter_bytes()])
            assert len(data) == 44 + 2 * 120
            with pytest.raises(openai.BadRequestError) as caught:
                await client.audio.speech.create(model="tts-1", voice="nobody", input="a")
            assert caught.value.param == "voice"
