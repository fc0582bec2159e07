"""POST /tokenize and /detokenize, in vLLM's shapes: what a prompt looks like to the model."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServerContext, get_context
from vllm_mlx.api.openai.convert import messages_of, tools_of
from vllm_mlx.api.openai.schemas import DetokenizeRequest, TokenizeRequest
from vllm_mlx.api.requests import find_model, json_response
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import GenerationRequest

router = APIRouter(tags=["Tokens"])

Context = Annotated[ServerContext, Depends(get_context)]


@router.post(
    "/tokenize",
    summary="Token ids of a text or a chat",
    description="Give `prompt`, or `messages` (rendered by the chat template, as a chat would be).",
    openapi_extra=json_body(TokenizeRequest),
)
async def tokenize(http: Request, context: Context) -> Response:
    body = await read_body(http, TokenizeRequest)
    model = find_model(context, body.model)
    service = context.service_of(model.base_id)
    if (body.prompt is None) == (body.messages is None):
        raise InvalidRequest("Give one of 'prompt' and 'messages'.", param="prompt", code="invalid_value")
    if body.prompt is not None:
        request = GenerationRequest(id="tokenize", prompt=body.prompt)
    else:
        tools, choice = tools_of(body.tools, None)
        request = GenerationRequest(
            id="tokenize",
            messages=messages_of(body.messages or (), video_options={}),
            tools=tools,
            tool_choice=choice,
            template_kwargs=body.chat_template_kwargs or {},
            continue_final_message=bool(body.continue_final_message),
        )
    token_ids = await service.tokenize_prompt(request, add_special_tokens=body.add_special_tokens is not False)
    strings = [service.token_text(token_id) for token_id in token_ids] if body.return_token_strs else None
    return json_response(
        {"count": len(token_ids), "max_model_len": model.context_tokens, "tokens": token_ids, "token_strs": strings}
    )


@router.post("/detokenize", summary="Text of token ids", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(http: Request, context: Context) -> Response:
    body = await read_body(http, DetokenizeRequest)
    model = find_model(context, body.model)
    if model.vocab_size is not None:
        for i, token_id in enumerate(body.tokens):
            if token_id >= model.vocab_size:
                raise InvalidRequest(
                    f"Token id {token_id} is outside the vocabulary of {model.vocab_size}.",
                    param=f"tokens.{i}",
                    code="invalid_value",
                )
    return json_response({"prompt": await context.service_of(model.base_id).detokenize(tuple(body.tokens))})
