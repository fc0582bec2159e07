"""POST /v1/audio/speech: a text spoken, sent as it is made. GET /v1/audio/voices."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends
from pydantic import Discriminator, Field, Tag
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.beside import beside_job, find_beside, open_stream
from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.requests import json_response
from vllm_mlx.api.sse import EventStream
from vllm_mlx.api.wire import WireModel
from vllm_mlx.errors import EngineError, InvalidRequest
from vllm_mlx.generation import audio_files
from vllm_mlx.generation.oneshot import BesideModel
from vllm_mlx.generation.speech import SpeakOptions, SpeechService

router = APIRouter(tags=["Audio"])

Context = Annotated[ServerContext, Depends(get_context)]


class VoiceId(WireModel):
    id: str


class SpeechRequest(WireModel):
    """OpenAI's body. Without `response_format`: mp3 where the server can make it, else wav."""

    model: str | None = None
    input: str = Field(min_length=1)
    voice: (
        Annotated[
            Annotated[str, Tag("<name>")] | Annotated[VoiceId, Tag("<object>")],
            Discriminator(lambda value: "<name>" if isinstance(value, str) else "<object>"),
        ]
        | None
    ) = None
    instructions: str | None = None
    response_format: Literal["mp3", "opus", "aac", "flac", "wav", "pcm"] | None = None
    speed: Annotated[float, Field(ge=0.25, le=4)] = 1.0
    stream_format: Literal["audio", "sse"] | None = None


@router.post(
    "/v1/audio/speech",
    summary="Text to speech",
    description="Answers with sound as it is made: wav and pcm always, mp3, opus, aac and flac where ffmpeg is "
    "installed. Needs `--tts-model`.",
    openapi_extra=json_body(SpeechRequest),
)
async def speak(http: Request, context: Context) -> Response:
    body = await read_body(http, SpeechRequest)
    model = find_beside(context, "speech", body.model)
    limit = context.settings.beside.max_tts_input_chars
    if len(body.input) > limit:
        raise InvalidRequest(
            f"'input' has {len(body.input)} characters; the limit here is {limit} (--max-tts-input-chars).",
            param="input",
            code="string_above_max_length",
        )
    if not body.input.strip():
        raise InvalidRequest("'input' holds nothing to say.", param="input", code="invalid_value")
    voice = body.voice.id if isinstance(body.voice, VoiceId) else body.voice
    name = body.response_format or ("mp3" if audio_files.can_write("mp3") else "wav")
    audio_files.require_writer(name)
    options = SpeakOptions(voice=voice, speed=body.speed, instructions=body.instructions)
    is_sse = body.stream_format == "sse"
    sound = _sound(http, context, model, body.input, options, name)
    media_type = "text/event-stream" if is_sse else audio_files.FORMATS[name].media_type
    return EventStream(await open_stream(http, sound), _Sse() if is_sse else _Bytes(), media_type=media_type)


@router.get("/v1/audio/voices", summary="The voices of the text-to-speech model")
async def voices(context: Context, model: str | None = None) -> Response:
    found = find_beside(context, "speech", model)
    async with found.use() as service:
        names = service.model.voices
    return json_response({"model": found.id, "voices": [{"id": name, "name": name} for name in names]})


async def _sound(
    http: Request, context: ServerContext, model: BesideModel, text: str, options: SpeakOptions, name: str
) -> AsyncGenerator[tuple[int, bytes | None], None]:
    """The file's bytes as they are ready; None at the end."""
    async with beside_job(context, http, model, "speech", is_stream=True) as job:
        service: SpeechService = job.service
        options = replace(options, voice=service.voice(options.voice))
        async with aclosing(service.speak(text, options)) as samples:
            try:
                first = await anext(samples)
            except StopAsyncIteration:
                raise EngineError("The model made no sound of this text.") from None

            async def all_samples() -> AsyncIterator[Any]:
                yield first
                async for more in samples:
                    yield more

            encoder = audio_files.Encoder(name, service.model.sample_rate)
            async with aclosing(encoder.encode(all_samples())) as data:
                async for piece in data:
                    yield 0, piece
        yield 0, None


class _Bytes:
    """The file itself. There is no place in it for words: after a failure the connection breaks off."""

    def render(self, index: int, event: bytes | None) -> bytes:
        return event or b""

    def failed(self, answer: ErrorAnswer) -> bytes:
        raise EngineError(answer.message)


class _Sse:
    """OpenAI's events with the file's bytes in base64."""

    def render(self, index: int, event: bytes | None) -> bytes:
        if event is None:
            return self._event({"type": "speech.audio.done"})
        return self._event({"type": "speech.audio.delta", "audio": base64.b64encode(event).decode()})

    def failed(self, answer: ErrorAnswer) -> bytes:
        return self._event({"type": "error", **answer.openai()})

    def _event(self, body: dict[str, Any]) -> bytes:
        return b"data: " + orjson.dumps(body) + b"\n\n"
