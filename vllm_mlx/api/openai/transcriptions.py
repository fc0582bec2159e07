"""POST /v1/audio/transcriptions and /v1/audio/translations: a file and form fields, as OpenAI's clients send them."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import FormData, UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response

from vllm_mlx.api.beside import beside_job, find_beside, open_stream
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import ErrorAnswer, HttpError, invalid_from
from vllm_mlx.api.openai import subtitles
from vllm_mlx.api.requests import json_response
from vllm_mlx.api.sse import EventStream
from vllm_mlx.errors import Cancelled, InvalidRequest
from vllm_mlx.generation.oneshot import BesideModel
from vllm_mlx.generation.speech import Clip, Language, Segment, TranscribeOptions, TranscriptionService

router = APIRouter(tags=["Audio"])

Context = Annotated[ServerContext, Depends(get_context)]

MAX_FIELDS = 64


class TranscriptionForm(BaseModel):
    """The fields beside `file`. Forms hold texts, so these become numbers where numbers are meant."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    temperature: Annotated[float, Field(ge=0, le=1)] = 0.0
    timestamp_granularities: list[Literal["word", "segment"]] = []
    stream: bool = False


_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **TranscriptionForm.model_json_schema()["properties"],
                    },
                }
            }
        },
    }
}


@router.post(
    "/v1/audio/transcriptions",
    summary="Speech to text",
    description="`response_format` is json, text, srt, vtt or verbose_json; `stream` sends text as it is heard. Needs "
    "`--stt-model`.",
    openapi_extra=_FORM,
)
async def transcribe(http: Request, context: Context) -> Response:
    return await _answer(http, context, translates=False)


@router.post(
    "/v1/audio/translations",
    summary="Speech of any language to English text",
    description="As transcriptions; needs a multilingual Whisper as `--stt-model`.",
    openapi_extra=_FORM,
)
async def translate(http: Request, context: Context) -> Response:
    return await _answer(http, context, translates=True)


async def _answer(http: Request, context: ServerContext, *, translates: bool) -> Response:
    form, data = await _read_form(http, context)
    model = find_beside(context, "transcription", form.model)
    options = TranscribeOptions(
        language=form.language,
        translates=translates,
        prompt=form.prompt or None,
        temperature=form.temperature,
        has_words="word" in form.timestamp_granularities,
    )
    if options.has_words and form.response_format != "verbose_json":
        raise InvalidRequest(
            "'timestamp_granularities' needs 'response_format': verbose_json.", param="timestamp_granularities"
        )
    if form.stream:
        if form.response_format not in ("json", "text"):
            raise InvalidRequest("A stream has 'response_format' json or text.", param="response_format")
        events = _stream(http, context, model, data, options)
        return EventStream(await open_stream(http, events), _Pass())
    async with beside_job(context, http, model, "transcription") as job:
        service: TranscriptionService = job.service
        options = _fit(service, options)
        clip = await service.decode(data)
        heard = [item async for item in service.transcribe(clip, options)]
        return _whole(service, form, options, clip, heard)


async def _stream(
    http: Request, context: ServerContext, model: BesideModel, data: bytes, options: TranscribeOptions
) -> AsyncGenerator[tuple[int, bytes], None]:
    """OpenAI's events: text as it is heard, then all of it."""
    text = ""
    async with beside_job(context, http, model, "transcription", is_stream=True) as job:
        service: TranscriptionService = job.service
        options = _fit(service, options)
        clip = await service.decode(data)
        yield 0, b""  # the file is sound: from here on the answer is a stream
        async with aclosing(service.transcribe(clip, options)) as heard:
            async for item in heard:
                if isinstance(item, Segment):
                    delta = item.text if text else item.text.lstrip()
                    text += delta
                    yield 0, _event({"type": "transcript.text.delta", "delta": delta})
        done = {"type": "transcript.text.done", "text": text.strip(), "usage": _usage(clip)}
        yield 0, _event(done)


class _Pass:
    """Events are bytes already."""

    def render(self, index: int, event: bytes) -> bytes:
        return event

    def failed(self, answer: ErrorAnswer) -> bytes:
        return _event({"type": "error", **answer.openai()})


def _whole(
    service: TranscriptionService,
    form: TranscriptionForm,
    options: TranscribeOptions,
    clip: Clip,
    heard: Sequence[Language | Segment],
) -> Response:
    segments = [item for item in heard if isinstance(item, Segment)]
    text = "".join(segment.text for segment in segments).strip()
    match form.response_format:
        case "text":
            return PlainTextResponse(text + "\n")
        case "srt":
            return PlainTextResponse(subtitles.srt(segments), media_type="application/x-subrip")
        case "vtt":
            return PlainTextResponse(subtitles.vtt(segments), media_type="text/vtt")
        case "json":
            return json_response({"text": text, "usage": _usage(clip)})
    code = next((item.code for item in heard if isinstance(item, Language)), None)
    body: dict[str, Any] = {
        "task": "translate" if options.translates else "transcribe",
        "language": "english" if options.translates else service.model.languages.get(code or "", code or "unknown"),
        "duration": round(clip.seconds, 3),
        "text": text,
        "usage": _usage(clip),
    }
    if "segment" in form.timestamp_granularities or not form.timestamp_granularities:
        body["segments"] = [_segment(i, segment) for i, segment in enumerate(segments)]
    if options.has_words:
        words = [word for segment in segments for word in segment.words]
        body["words"] = [{"word": word.word, "start": word.start, "end": word.end} for word in words]
    return json_response(body)


def _segment(index: int, segment: Segment) -> dict[str, Any]:
    return {
        "id": index,
        "seek": segment.seek,
        "start": segment.start,
        "end": segment.end,
        "text": segment.text,
        "tokens": segment.token_ids,
        "temperature": segment.temperature,
        "avg_logprob": segment.avg_logprob,
        "compression_ratio": segment.compression_ratio,
        "no_speech_prob": segment.no_speech_prob,
    }


def _usage(clip: Clip) -> dict[str, Any]:
    return {"type": "duration", "seconds": math.ceil(clip.seconds)}


def _event(body: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(body) + b"\n\n"


async def _read_form(http: Request, context: ServerContext) -> tuple[TranscriptionForm, bytes]:
    """The fields and the file's bytes; raises InvalidRequest naming the field."""
    if not http.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise InvalidRequest("Send multipart/form-data with the audio as 'file'.", param="file", code="invalid_type")
    try:
        async with http.form(max_files=1, max_fields=MAX_FIELDS) as form:
            fields = _fields(form)
            file = form.get("file")
            if not isinstance(file, UploadFile):
                raise InvalidRequest(
                    "Missing required parameter: 'file'.", param="file", code="missing_required_parameter"
                )
            limit_mib = context.settings.beside.max_audio_upload_mb
            if (file.size or 0) > limit_mib * 2**20:
                raise HttpError(
                    413,
                    f"The file is larger than {limit_mib:g} MiB, the limit here (--max-audio-upload-mb).",
                    code="request_too_large",
                )
            data = await file.read()
    except ClientDisconnect as error:
        raise Cancelled("The client left before its request was complete.") from error
    if not data:
        raise InvalidRequest("'file' is empty.", param="file", code="invalid_value")
    try:
        return TranscriptionForm.model_validate(fields), data
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_context=False, include_input=False)) from error


def _fields(form: FormData) -> dict[str, Any]:
    """Text fields by name; an empty one counts as left out."""
    fields: dict[str, Any] = {}
    for name, value in form.multi_items():
        if not isinstance(value, str) or not value.strip():
            continue
        if name.removesuffix("[]") == "timestamp_granularities":
            fields.setdefault("timestamp_granularities", []).append(value)
        else:
            fields[name] = value
    return fields


def _fit(service: TranscriptionService, options: TranscribeOptions) -> TranscribeOptions:
    """The options in the model's own words; raises InvalidRequest for what it cannot do."""
    fitted = replace(options, language=_language(service, options.language))
    service.check(fitted)
    return fitted


def _language(service: TranscriptionService, name: str | None) -> str | None:
    """A code for a code, a name ("German") or a locale ("de-AT"); what is unknown is left for `check` to refuse."""
    if name is None:
        return None
    wanted = name.strip().lower()
    languages = service.model.languages
    by_name = {language: code for code, language in languages.items()}
    short = wanted.replace("_", "-").split("-")[0]
    return by_name.get(wanted) or (short if wanted not in languages and short in languages else wanted)
