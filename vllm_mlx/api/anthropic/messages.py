"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.anthropic.convert import messages_request, prompt_request
from vllm_mlx.api.anthropic.render import MessageRenderer
from vllm_mlx.api.anthropic.schemas import CountTokensRequest, MessagesRequest
from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.errors import request_id_of
from vllm_mlx.api.fields import shown_diagnostics
from vllm_mlx.api.identity import answer_id
from vllm_mlx.api.params import rename_by, renamed_params
from vllm_mlx.api.requests import Job, caller_of, check_trust, find_model, json_response, run_rendered, run_stream

router = APIRouter(tags=["Anthropic"])

Context = Annotated[ServerContext, Depends(get_context)]

_RENAME = rename_by({
    r"tools\.(\d+)\.function\.parameters": r"tools.\1.input_schema",
    r"tools\.(\d+)\.function\.name": r"tools.\1.name",
    r"messages\..*\.tool_call.*": "messages",
    r"stop(\.\d+)?": r"stop_sequences\1",
    r"response_format.*": "output_config.format.schema",
    r"reasoning_effort": "output_config.effort",
    r"max_thinking_tokens": "thinking.budget_tokens",
})  # fmt: skip


@router.post(
    "/v1/messages",
    summary="Answer a conversation",
    description="Anthropic's Messages; streamed as server-sent events when `stream` is true.",
    openapi_extra=json_body(MessagesRequest),
)
async def create_message(http: Request, context: Context) -> Response:
    body = await read_body(http, MessagesRequest)
    model = find_model(context, body.model, body.adapter)
    caller = caller_of(http)
    check_trust(context, caller, body.repetition_policy_override)
    id = answer_id(context, "msg_", body)
    request = messages_request(body, id=id, client=caller.name, namespace=caller.namespace, model=model.id)
    job = Job(
        id=id,
        route="messages",
        model=model,
        requests=[request],
        is_stream=bool(body.stream),
        asked_model=body.model,
    )
    cache = context.settings.cache
    renderer = MessageRenderer(
        id=id,
        model=model.id,
        request_id=request_id_of(http.scope),
        block_size=cache.block_size if cache.prefix_cache else None,
        diagnostics_level=shown_diagnostics(body),
    )
    with renamed_params(_RENAME):
        if body.stream:
            return await run_stream(context, http, job, renderer)
        await run_rendered(context, http, job, renderer)
    return json_response(renderer.message())


@router.post(
    "/v1/messages/count_tokens",
    summary="Count the tokens of a conversation",
    description="Exactly the prompt tokens that the same request to /v1/messages would be billed for.",
    openapi_extra=json_body(CountTokensRequest),
)
async def count_tokens(http: Request, context: Context) -> Response:
    body = await read_body(http, CountTokensRequest)
    model = find_model(context, body.model)
    request = prompt_request(body, id="count_tokens", model=model.id)
    with renamed_params(_RENAME):
        return json_response({"input_tokens": await context.service_of(model.base_id).count_prompt_tokens(request)})
