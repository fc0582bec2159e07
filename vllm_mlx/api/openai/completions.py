"""POST /v1/completions: text or token prompts, one or several, continued without a chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import Generation, ServerContext, get_context
from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.fields import shown_diagnostics
from vllm_mlx.api.identity import answer_id, created
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
from vllm_mlx.api.sse import DONE, keep_alive
from vllm_mlx.generation.events import (
    Accepted,
    Finished,
    KeepAlive,
    LogprobEntry,
    LogprobsDelta,
    Message,
    OutputEvent,
)
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
    model = find_model(context, body.model, body.adapter)
    caller = caller_of(http)
    check_trust(context, caller, body.repetition_policy_override)
    prompts, n = prompts_of(body), body.n or 1
    check_choices(context, n * len(prompts))
    service = context.service_of(model.base_id)
    echoes = await _echoes(service, prompts, n) if body.echo else [""] * (n * len(prompts))
    id = answer_id(context, "cmpl-", body)
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
    job = Job(
        id=id,
        route="completions",
        model=model,
        requests=requests,
        is_stream=bool(body.stream),
        asked_model=body.model,
    )
    if body.stream:
        renderer = CompletionRenderer(
            service,
            body,
            id=id,
            model=model.id,
            fingerprint=model.fingerprint,
            created=created(context, model),
            echoes=echoes,
            choices_per_prompt=n,
        )
        return await run_stream(context, http, job, renderer)

    messages = await run_whole(context, http, job)
    if body.max_tokens == 0:
        messages = [_without_completion(message) for message in messages]
    finals = [render.final_of(message) for message in messages]
    answer = {
        "id": id,
        "object": "text_completion",
        "created": created(context, model),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
        "choices": [
            _choice(service, body, i, echo, message)
            for i, (echo, message) in enumerate(zip(echoes, messages, strict=True))
        ],
        "usage": render.usage_of(finals, choices_per_prompt=n),
    }
    level = shown_diagnostics(body)
    if diagnostics := render.diagnostics_of(finals, level):
        answer["diagnostics"] = diagnostics
    return json_response(answer)


def _choice(service: Generation, body: CompletionRequest, index: int, echo: str, message: Message) -> dict[str, Any]:
    final = render.final_of(message)
    choice: dict[str, Any] = {
        "index": index,
        "text": echo + message.text,
        "logprobs": None,
        "finish_reason": render.finish_reason(final),
        **render.stop_fields(final),
    }
    if body.logprobs is not None:
        scored = _scored_prompt(service, message.accepted, message.prompt_logprobs) if body.echo else []
        choice["logprobs"] = render.legacy_logprobs([*scored, *message.logprobs], text_offset=0)
    if body.prompt_logprobs is not None:
        choice["prompt_logprobs"] = render.prompt_logprobs(message.prompt_logprobs)
    return choice


def _scored_prompt(
    service: Generation, accepted: Accepted | None, entries: Sequence[LogprobEntry]
) -> list[LogprobEntry]:
    """The prompt's tokens with what they scored, the first of which has none."""
    assert accepted is not None, "a generation without Accepted"
    first_id = accepted.prompt_token_ids[0]
    return [render.unscored(service.token_text(first_id), first_id), *entries]


def _without_completion(message: Message) -> Message:
    """Of an answer whose completion nobody asked for, the prompt's part."""
    final = _no_completion(render.final_of(message))
    return replace(message, text="", logprobs=[], finished=final)


def _no_completion(final: Finished) -> Finished:
    return replace(final, reason="length", stop_sequence=None, usage=replace(final.usage, num_completion_tokens=0))


async def _echoes(service: Generation, prompts: Sequence[str | tuple[int, ...]], n: int) -> list[str]:
    """The text each choice begins with when the prompt is to be echoed."""
    texts = [prompt if isinstance(prompt, str) else await service.detokenize(prompt) for prompt in prompts]
    return [text for text in texts for _ in range(n)]


class CompletionRenderer:
    """Bytes of a streamed completion. One per HTTP request; implements `sse.Renderer`."""

    def __init__(
        self,
        service: Generation,
        body: CompletionRequest,
        *,
        id: str,
        model: str,
        fingerprint: str,
        created: int,
        echoes: Sequence[str],
        choices_per_prompt: int,
    ) -> None:
        self._service = service
        self._body = body
        self._include_usage = bool(body.stream_options and body.stream_options.include_usage)
        head = {
            "id": id,
            "object": "text_completion",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._head = b"data: " + orjson.dumps(head)[:-1]
        self._tail = b',"usage":null}\n\n' if self._include_usage else b"}\n\n"
        self._prefixes = [self._head + b',"choices":[{"index":%d,"text":' % i for i in range(len(echoes))]
        self._middle = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._choices_per_prompt = choices_per_prompt
        self._diagnostics_level = shown_diagnostics(body)
        self._echoes = list(echoes)
        # Where the text of the next scored token begins; an echoed prompt is scored too.
        self._offsets = [0] * len(echoes)
        self._accepted: list[Accepted | None] = [None] * len(echoes)
        self._logprobs: list[list[LogprobEntry]] = [[] for _ in echoes]
        self._finals: dict[int, Finished] = {}

    def render(self, index: int, event: OutputEvent) -> bytes:
        match event:
            case TextDelta() if self._body.max_tokens == 0:
                return b""
            case TextDelta():
                text, self._echoes[index] = self._echoes[index] + event.text, ""
                if not self._logprobs[index]:
                    return self._prefixes[index] + orjson.dumps(text) + self._middle
                rest = {"logprobs": self._take_logprobs(index), "finish_reason": None}
                return self._chunk(index, text, rest)
            case Accepted():
                self._accepted[index] = event
            case LogprobsDelta(is_prompt=True):
                scored = _scored_prompt(self._service, self._accepted[index], event.entries)
                self._logprobs[index].extend(scored)
            case LogprobsDelta() if self._body.max_tokens != 0:
                self._logprobs[index].extend(event.entries)
            case KeepAlive():
                return keep_alive(event)
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
        if self._body.max_tokens == 0:
            event = _no_completion(event)
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
