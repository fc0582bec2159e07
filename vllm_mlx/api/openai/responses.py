"""POST /v1/responses, and what can be done with responses afterwards: retrieve, delete, cancel, list their input."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Depends, Query
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import ServedModel, ServerContext, get_context
from vllm_mlx.api.errors import HttpError
from vllm_mlx.api.fields import shown_diagnostics
from vllm_mlx.api.identity import answer_id, created
from vllm_mlx.api.live import LiveRequest
from vllm_mlx.api.openai.response_store import StoredResponse
from vllm_mlx.api.openai.responses_convert import Converted, input_items, prompt_request, responses_request
from vllm_mlx.api.openai.responses_render import ResponseRenderer
from vllm_mlx.api.openai.responses_schemas import FunctionTool, InputItem, InputTokensRequest, ResponsesRequest
from vllm_mlx.api.params import refuse, rename_by, renamed_params
from vllm_mlx.api.requests import Job, caller_of, check_trust, find_model, json_response, run_rendered, run_stream
from vllm_mlx.errors import InvalidRequest

router = APIRouter(tags=["OpenAI Responses"])

Context = Annotated[ServerContext, Depends(get_context)]

_ITEMS: TypeAdapter[list[InputItem]] = TypeAdapter(list[InputItem])
_RENAME = rename_by({
    r"messages(\.\d+.*)?": "input",
    r"response_format.*": "text.format.schema",
    r"max_tokens": "max_output_tokens",
    r"reasoning_effort": "reasoning.effort",
})  # fmt: skip


@router.post(
    "/v1/responses",
    summary="Answer a conversation",
    description="OpenAI's Responses; server-sent events when `stream` is true. Unless `store` is false the response is "
    "kept for `previous_response_id` and retrieval. Tools that run at OpenAI are left out, and `notes` says so.",
    openapi_extra=json_body(ResponsesRequest),
)
async def create_response(http: Request, context: Context) -> Response:
    body = await read_body(http, ResponsesRequest)
    model = find_model(context, body.model, body.adapter)
    caller = caller_of(http)
    check_trust(context, caller, body.repetition_policy_override)
    id = answer_id(context, "resp_", body)
    history = earlier_items(context, http, body.previous_response_id)
    converted = responses_request(
        body, id=id, history=history, client=caller.name, namespace=caller.namespace, model=model.id
    )
    cache = context.settings.cache
    renderer = ResponseRenderer(
        head_of(body, converted, id=id, model=model, created_at=created(context, model)),
        names=converted.names,
        seals_reasoning="reasoning.encrypted_content" in (body.include or ()),
        block_size=cache.block_size if cache.prefix_cache else None,
        diagnostics_level=shown_diagnostics(body),
        now=lambda: created(context, model),
        keep=_keeper(context, http, body) if body.store is not False else lambda response: None,
    )
    job = Job(
        id=id,
        route="responses",
        model=model,
        requests=[converted.request],
        is_stream=bool(body.stream),
        asked_model=body.model,
        owner=owner_of(http),
        snapshot=lambda: renderer.response,
    )
    with renamed_params(_namer(converted)):
        if body.stream:
            return await run_stream(context, http, job, renderer)
        await run_rendered(context, http, job, renderer)
    return json_response(renderer.response)


@router.post(
    "/v1/responses/input_tokens",
    summary="Count the tokens of a response's input",
    description="Exactly the input tokens that the same request to /v1/responses would be billed for.",
    openapi_extra=json_body(InputTokensRequest),
)
async def count_input_tokens(http: Request, context: Context) -> Response:
    body = await read_body(http, InputTokensRequest)
    model = find_model(context, body.model)
    history = earlier_items(context, http, body.previous_response_id)
    converted = prompt_request(body, id="input_tokens", history=history, model=model.id)
    with renamed_params(_namer(converted)):
        count = await context.service_of(model.base_id).count_prompt_tokens(converted.request)
    return json_response({"object": "response.input_tokens", "input_tokens": count})


@router.get(
    "/v1/responses/{response_id}",
    summary="Retrieve a response",
    description="One that was stored, or one that is being generated: as far as it has come.",
)
async def retrieve_response(
    response_id: str, http: Request, context: Context, stream: Annotated[bool, Query()] = False
) -> Response:
    if stream:
        raise refuse("stream", "an earlier response is not streamed again; leave 'stream' out.")
    if (stored := context.responses.get(response_id, owner_of(http))) is not None:
        return Response(stored.response, media_type="application/json")
    if (live := _live(context, http, response_id)) is not None and live.snapshot is not None:
        return json_response(live.snapshot())
    raise _unknown(response_id)


@router.delete("/v1/responses/{response_id}", summary="Forget a stored response")
async def delete_response(response_id: str, http: Request, context: Context) -> Response:
    if not context.responses.delete(response_id, owner_of(http)):
        raise _unknown(response_id)
    return json_response({"id": response_id, "object": "response", "deleted": True})


@router.post(
    "/v1/responses/{response_id}/cancel",
    summary="End a response early",
    description="Whoever waits for it gets what was generated so far, with the status `cancelled`.",
)
async def cancel_response(response_id: str, http: Request, context: Context) -> Response:
    live = _live(context, http, response_id)
    if live is not None and live.snapshot is not None:
        context.live.cancel(live, context.service_of(live.base_model).cancel)
        return json_response({**live.snapshot(), "status": "cancelled"})
    if (stored := context.responses.get(response_id, owner_of(http))) is not None:
        status = stored.read_response()["status"]
        raise InvalidRequest(
            f"The response '{response_id}' is {status} and cannot be cancelled any more.",
            param="response_id",
            code="response_ended",
        )
    raise _unknown(response_id)


@router.get(
    "/v1/responses/{response_id}/input_items",
    summary="List what a response answers",
    description="All items of the conversation up to it, those of the responses before it included.",
)
async def list_input_items(
    response_id: str,
    http: Request,
    context: Context,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Annotated[Literal["asc", "desc"], Query()] = "desc",
    after: Annotated[str | None, Query(description="Id of the item behind which the page begins.")] = None,
) -> Response:
    chain = context.responses.chain(response_id, owner_of(http))
    if chain is None:
        raise _unknown(response_id)
    items = [item for entry in chain[:-1] for item in (*entry.read_input(), *entry.read_response()["output"])]
    items += chain[-1].read_input()
    if order == "desc":
        items.reverse()
    if after is not None:
        places = [i for i, item in enumerate(items) if item["id"] == after]
        if not places:
            raise InvalidRequest(f"There is no item '{after}' here.", param="after", code="invalid_value")
        items = items[places[0] + 1 :]
    page = items[:limit]
    ends = {"first_id": page[0]["id"] if page else None, "last_id": page[-1]["id"] if page else None}
    return json_response({"object": "list", "data": page, **ends, "has_more": len(items) > limit})


def head_of(
    body: ResponsesRequest, converted: Converted, *, id: str, model: ServedModel, created_at: int
) -> dict[str, Any]:
    """What of a response is known from its request."""
    text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
    choice = body.tool_choice
    head = {
        "id": id,
        "object": "response",
        "created_at": created_at,
        "completed_at": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "metadata": body.metadata or {},
        "model": model.id,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {
            "effort": body.reasoning.effort if body.reasoning else None,
            "summary": body.reasoning.summary if body.reasoning else None,
        },
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}, "verbosity": "medium", **text},
        "tool_choice": choice if isinstance(choice, str) else _dumped(choice) if choice else "auto",
        "tools": [_dumped(tool) for tool in body.tools or ()],
        "top_p": body.top_p,
        "truncation": body.truncation or "disabled",
        "user": body.user,
    }
    return {**head, "notes": list(converted.notes)} if converted.notes else head


def _dumped(model: Any) -> dict[str, Any]:
    """A tool as it was sent; of a function also what its type says is always there."""
    dumped: dict[str, Any] = model.model_dump(by_alias=True, exclude_none=True)
    if isinstance(model, FunctionTool):
        dumped = {"description": None, "parameters": None, "strict": False, **dumped}
    return dumped


def owner_of(http: Request) -> str:
    """Who may see a response later: the key's holder, or everybody where there are no keys."""
    caller = caller_of(http)
    return caller.name if caller.is_authenticated else ""


def earlier_items(context: ServerContext, http: Request, previous_id: str | None) -> Sequence[InputItem]:
    """Everything said in the conversation that ends with the response `previous_id`."""
    if previous_id is None:
        return ()
    chain = context.responses.chain(previous_id, owner_of(http))
    if chain is None:
        raise InvalidRequest(
            f"The response '{previous_id}', or one before it, is not stored here; send the whole input.",
            param="previous_response_id",
            code="previous_response_not_found",
        )
    items = [item for entry in chain for item in (*entry.read_input(), *entry.read_response()["output"])]
    return _ITEMS.validate_python(items)


def _keeper(context: ServerContext, http: Request, body: ResponsesRequest) -> Callable[[dict[str, Any]], None]:
    def keep(response: dict[str, Any]) -> None:
        items = [stored_item(item) for item in input_items(body)]
        context.responses.put(
            StoredResponse(
                response["id"], owner_of(http), body.previous_response_id, orjson.dumps(items), orjson.dumps(response)
            )
        )

    return keep


def stored_item(item: Any) -> dict[str, Any]:
    """An input item as it is listed later: with an id, and text as parts."""
    dumped: dict[str, Any] = item.model_dump(by_alias=True, exclude_none=True)
    if dumped["type"] == "message" and isinstance(dumped["content"], str):
        kind = "output_text" if dumped["role"] == "assistant" else "input_text"
        dumped["content"] = [{"type": kind, "text": dumped["content"]}]
    prefix = "msg" if dumped["type"] == "message" else "item"
    return {"id": f"{prefix}_{uuid.uuid4().hex}", "status": "completed", **dumped}


def _namer(converted: Converted) -> Callable[[str], str]:
    """Fields of OpenAI's chat, as Responses names them."""

    def rename(param: str) -> str:
        first, _, rest = param.partition(".")
        number, _, field = rest.partition(".")
        if first == "tools" and number.isdigit() and int(number) < len(converted.tool_paths):
            return f"{converted.tool_paths[int(number)]}.{field.removeprefix('function.')}"
        return _RENAME(param)

    return rename


def _live(context: ServerContext, http: Request, response_id: str) -> LiveRequest | None:
    live = context.live.find(response_id)
    return live if live is not None and live.route == "responses" and live.owner == owner_of(http) else None


def _unknown(response_id: str) -> HttpError:
    return HttpError(404, f"The response '{response_id[:80]}' is not stored here.", code="response_not_found")
