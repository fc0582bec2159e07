"""POST /v1/chat/completions: parse, generate, and render chunks or one message."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.fields import shown_diagnostics
from vllm_mlx.api.identity import answer_id, created
from vllm_mlx.api.openai import render
from vllm_mlx.api.openai.convert import chat_request
from vllm_mlx.api.openai.schemas import ChatCompletionRequest
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

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/chat/completions",
    summary="Answer a chat",
    description="OpenAI's Chat Completions with vLLM's extensions; server-sent events when `stream` is true.",
    openapi_extra=json_body(ChatCompletionRequest),
)
async def create_chat_completion(http: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    body = await read_body(http, ChatCompletionRequest)
    model = find_model(context, body.model, body.adapter)
    caller = caller_of(http)
    check_trust(context, caller, body.repetition_policy_override)
    n = body.n or 1
    check_choices(context, n)
    id = answer_id(context, "chatcmpl-", body)
    requests = [
        chat_request(
            body,
            id=id if n == 1 else f"{id}-{i}",
            seed_offset=i,
            client=caller.name,
            namespace=caller.namespace + (body.cache_salt or ""),
            model=model.id,
        )
        for i in range(n)
    ]
    job = Job(
        id=id,
        route="chat",
        model=model,
        requests=requests,
        is_stream=bool(body.stream),
        asked_model=body.model,
    )
    level = shown_diagnostics(body)
    if body.stream:
        renderer = render.ChatRenderer(
            id=id,
            model=model.id,
            fingerprint=model.fingerprint,
            created=created(context, model),
            num_choices=n,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            diagnostics_level=level,
        )
        return await run_stream(context, http, job, renderer)

    messages = await run_whole(context, http, job)
    finals = [render.final_of(message) for message in messages]
    answer = {
        "id": id,
        "object": "chat.completion",
        "created": created(context, model),
        "model": model.id,
        "system_fingerprint": model.fingerprint,
        "choices": [
            {
                "index": i,
                "message": render.chat_message(message, answer_id=id, index=i),
                "logprobs": render.chat_logprobs(message.logprobs) if body.logprobs else None,
                "finish_reason": render.finish_reason(final),
                **render.stop_fields(final),
            }
            for i, (message, final) in enumerate(zip(messages, finals, strict=True))
        ],
        "usage": render.usage_of(finals, choices_per_prompt=n),
    }
    if body.prompt_logprobs is not None:
        answer["prompt_logprobs"] = render.prompt_logprobs(messages[0].prompt_logprobs)
    if diagnostics := render.diagnostics_of(finals, level):
        answer["diagnostics"] = diagnostics
    return json_response(answer)
