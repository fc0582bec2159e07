"""POST /v1/completions: text or token prompts, one or several, continued without a chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.openai import render
from vllm_mlx.api.openai.convert import completion_request, prompts_of
from vllm_mlx.api.openai.schemas import CompletionRequest
from vllm_mlx.api.requests import (
    Job,
    caller_of,
    check_choices,
    check_trust,
    find_model,
    json_response,
    run_stream,
    run_whole,
)
from vllm_mlx.api.sse import DONE, KEEP_ALIVE
from vllm_mlx.generation.events import Finished, KeepAlive, LogprobEntry, LogprobsDelta, OutputEvent
from vllm_mlx.parsers.events import TextDelta

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/completions",
    summary="Continue a text",
    description="OpenAI's legacy Completions; `prompt` is a text, token ids, or a list of either.",
    openapi_extra=json_body(CompletionRequest),
)
async def create_completion(http: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    body = await read_body(http, CompletionRequest)
    model = find_model(context, body.model)
    caller = caller_of(http)
    check_trust(context, caller, body.repetition_policy_override)
    prompts, n = prompts_of(body), body.n or 1
    check_choices(context, n * len(prompts))
    id = render.make_id("cmpl")
    requests = [
        completion_request(
            body,
            prompt,
            id=f"{id}-{p * n + i}",
            seed_offset=i,
            client=caller.name,
            namespace=caller.namespace + (body.cache_salt or ""),
            model=model.id,
        )
        for p, prompt in enumerate(prompts)
        for i in range(n)
    ]
    echoes = await _echoes(context, prompts, n) if body.echo else [""] * len(requests)
    job = Job(id=id, route="completions", model=model, requests=requests, is_stream=bool(body.stream))
    level = render.diagnostics_level(body.include_diagnostics, body.diagnostics_level)
    if body.stream:
        renderer = CompletionRenderer(
            id=id,
            model=model.id,
            fingerprint=model.fingerprint,
            echoes=echoes,
            choices_per_prompt=n,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            diagnostics_level=level,
        )
        return await run_stream(context, http, job, renderer)

    messages = await run_whole(context, http, job)
    finals = [render.final_of(message) for message in messages]
    answer = {
        "id": id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
        "choices": [
            {
                "index": i,
                "text": echo + message.text,
                "logprobs": (
                    render.legacy_logprobs(message.logprobs, text_offset=len(echo))
                    if body.logprobs is not None
                    else None
                ),
                "finish_reason": render.finish_reason(final),
                **render.stop_fields(final),
            }
            for i, (echo, message, final) in enumerate(zip(echoes, messages, finals, strict=True))
        ],
        "usage": render.usage_of(finals, choices_per_prompt=n),
    }
    if diagnostics := render.diagnostics_of(finals, level):
        answer["diagnostics"] = diagnostics
    return json_response(answer)


async def _echoes(context: ServerContext, prompts: Sequence[str | tuple[int, ...]], n: int) -> list[str]:
    """The text each choice begins with when the prompt is to be echoed."""
    service = context.require_service()
    texts = [prompt if isinstance(prompt, str) else await service.detokenize(prompt) for prompt in prompts]
    return [text for text in texts for _ in range(n)]


class CompletionRenderer:
    """Bytes of a streamed completion. One per HTTP request; implements `sse.Renderer`."""

    def __init__(
        self,
        *,
        id: str,
        model: str,
        fingerprint: str,
        echoes: Sequence[str],
        choices_per_prompt: int,
        include_usage: bool,
        diagnostics_level: str | None,
    ) -> None:
        head = {
            "id": id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._prefixes = [self._head + b',"choices":[{"index":%d,"text":' % i for i in range(len(echoes))]
        self._middle = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._choices_per_prompt = choices_per_prompt
        self._include_usage = include_usage
        self._diagnostics_level = diagnostics_level
        self._echoes = list(echoes)
        self._offsets = [len(echo) for echo in echoes]
        self._logprobs: list[list[LogprobEntry]] = [[] for _ in echoes]
        self._finals: dict[int, Finished] = {}

    def render(self, index: int, event: OutputEvent) -> bytes:
        match event:
            case TextDelta():
                text, self._echoes[index] = self._echoes[index] + event.text, ""
                if not self._logprobs[index]:
                    return self._prefixes[index] + orjson.dumps(text) + self._middle
                rest = {"logprobs": self._take_logprobs(index), "finish_reason": None}
                return self._chunk(index, text, rest)
            case LogprobsDelta():
                self._logprobs[index].extend(event.entries)
            case KeepAlive():
                return KEEP_ALIVE
            case Finished():
                return self._finish(index, event)
        return b""

    def failed(self, answer: ErrorAnswer) -> bytes:
        return b"data: " + orjson.dumps(answer.openai()) + b"\n\n" + DONE

    def _chunk(self, index: int, text: str, rest: dict[str, Any], extra: bytes = b"") -> bytes:
        fields = b"," + orjson.dumps(rest)[1:]
        return self._prefixes[index] + orjson.dumps(text) + fields + b"]" + extra + self._tail

    def _take_logprobs(self, index: int) -> dict[str, Any] | None:
        entries, self._logprobs[index] = self._logprobs[index], []
        if not entries:
            return None
        offset = self._offsets[index]
        self._offsets[index] += sum(len(entry.token) for entry in entries)
        return render.legacy_logprobs(entries, text_offset=offset)

    def _finish(self, index: int, event: Finished) -> bytes:
        self._finals[index] = event
        text, self._echoes[index] = self._echoes[index], ""
        rest = {
            "logprobs": self._take_logprobs(index),
            "finish_reason": render.finish_reason(event),
            **render.stop_fields(event),
        }
        num_choices = len(self._prefixes)
        if len(self._finals) < num_choices:
            return self._chunk(index, text, rest)
        finals = [self._finals[i] for i in range(num_choices)]
        diagnostics = render.diagnostics_of(finals, self._diagnostics_level)
        extra = b',"diagnostics":' + orjson.dumps(diagnostics) if diagnostics else b""
        if not self._include_usage:
            return self._chunk(index, text, rest, extra) + DONE
        usage = orjson.dumps(render.usage_of(finals, choices_per_prompt=self._choices_per_prompt))
        last = self._head + b',"choices":[],"usage":' + usage + extra + b"}\n\n"
        return self._chunk(index, text, rest) + last + DONE
