"""The official `openai` package's Responses client, and Codex's request shape, against the application behind a socket.

The package builds its types without checking them; here each event is checked against them strictly as well.
"""

from __future__ import annotations

import json

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from tests.api.fakes import FakeGeneration, calls, finished, live_server, make_context, says, thinks
from tests.clients.test_openai_sdk import sdk
from vllm_mlx.errors import EngineError
from vllm_mlx.parsers.events import TextDelta

EVENT: TypeAdapter[ResponseStreamEvent] = TypeAdapter(ResponseStreamEvent)
SHELL = {
    "type": "function",
    "name": "exec_command",
    "description": "Runs a command",
    "strict": False,
    "parameters": {"type": "object", "properties": {"cmd": {"type": "string"}}, "required": ["cmd"]},
}
CODEX_TOOLS = [
    SHELL,
    {"type": "custom", "name": "apply_patch", "description": "", "format": {"type": "text"}},
    {"type": "namespace", "name": "agents", "description": "Others", "tools": [{**SHELL, "name": "spawn"}]},
    {"type": "web_search", "external_web_access": False},
]


async def test_a_response_is_typed_and_its_stream_folds_to_the_same():
    async with sdk(FakeGeneration(lambda r: thinks("hmm", "yes"))) as client:
        whole = await client.responses.create(model="default", input="Hi")
        async with client.responses.stream(model="default", input="Hi") as stream:
            events = [event async for event in stream]
            streamed = await stream.get_final_response()
    assert whole.output_text == streamed.output_text == "yes"
    assert whole.output[0].type == "reasoning" and whole.output[0].content[0].text == "hmm"
    assert whole.usage == streamed.usage and whole.usage.input_tokens_details.cached_tokens == 4
    assert [e.sequence_number for e in events if e.type == "response.completed"] == [len(events) - 1]
    Response.model_validate(whole.model_dump())


@pytest.mark.parametrize(
    "script",
    [
        thinks("hmm", "yes"),
        calls("exec_command", '{"cmd": ', '"ls"}'),
        calls("agents__spawn", '{"cmd": "ls"}'),
        calls("apply_patch", '{"input": "*** Begin"}'),
        says("cut", end=finished("length")),
        [TextDelta("a"), EngineError("broken")],
    ],
)
async def test_every_event_is_what_its_type_says(script):
    body = {"model": "default", "input": "Hi", "tools": CODEX_TOOLS, "stream": True}
    async with live_server(make_context(FakeGeneration(lambda r: script))) as address, httpx.AsyncClient() as client:
        answer = await client.post(f"{address}/v1/responses", json=body)
    data = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    for item in data:
        event = EVENT.validate_json(item)
        assert event.type == json.loads(item)["type"] and event.sequence_number == json.loads(item)["sequence_number"]


async def test_parse_returns_the_model_the_schema_came_from():
    class City(BaseModel):
        name: str

    service = FakeGeneration(lambda r: says('{"name": "Oslo"}'))
    async with sdk(service) as client:
        parsed = await client.responses.parse(model="default", input="Hi", text_format=City)
    assert parsed.output_parsed == City(name="Oslo")
    assert service.requests[0].output_format.kind == "json_schema" and service.requests[0].output_format.strict


async def test_function_calls_round_trip_with_and_without_the_servers_memory():
    service = FakeGeneration(lambda r: calls("exec_command", '{"cmd":"ls"}') if len(r.messages) == 1 else says("done"))
    async with sdk(service) as client:
        first = await client.responses.create(model="default", input="Hi", tools=CODEX_TOOLS)
        (call,) = first.output
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "files"}
        kept = await client.responses.create(model="default", input=[result], previous_response_id=first.id)
        sent = await client.responses.create(
            model="default", input=[{"role": "user", "content": "Hi"}, call.model_dump(exclude_none=True), result]
        )
    assert kept.output_text == sent.output_text == "done"
    assert service.requests[1].messages == service.requests[2].messages


async def test_responses_are_retrieved_listed_counted_and_deleted():
    async with sdk() as client:
        made = await client.responses.create(model="default", input="Hi")
        assert (await client.responses.retrieve(made.id)).output_text == made.output_text
        items = [item async for item in client.responses.input_items.list(made.id)]
        assert items[0].type == "message" and items[0].content[0].text == "Hi"
        assert (await client.responses.input_tokens.count(model="default", input="Hi")).input_tokens == 3
        with pytest.raises(openai.BadRequestError, match="completed"):
            await client.responses.cancel(made.id)
        await client.responses.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(made.id)


async def test_errors_are_the_packages_own_classes():
    async with sdk() as client:
        for fields, param in (({"temperature": -1}, "temperature"), ({"background": True}, "background")):
            with pytest.raises(openai.BadRequestError) as caught:
                await client.responses.create(model="default", input="Hi", **fields)
            assert caught.value.param == param


async def test_a_codex_session_goes_on_statelessly():
    """Its headers, its keys, its tools; the history comes back whole each time, with sealed reasoning."""
    script = [*thinks("need ls", "Looking.")[:-1], *calls("exec_command", '{"cmd":"ls"}', id="call_1")]
    service = FakeGeneration(lambda r: script if len(r.messages) < 5 else says("Done."))
    history = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
        {"type": "message", "role": "developer", "content": [
            {"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "environment"}]},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "list the files"}]},
    ]  # fmt: skip
    headers = {"originator": "codex_exec", "session-id": "s-1", "thread-id": "t-1", "x-client-request-id": "t-1"}
    async with live_server(make_context(service)) as address, httpx.AsyncClient(headers=headers) as client:
        for _ in range(2):
            body = {
                "model": "gpt-5", "stream": True, "store": False, "input": history, "tools": CODEX_TOOLS,
                "tool_choice": "auto", "parallel_tool_calls": True, "reasoning": {"summary": "auto"},
                "include": ["reasoning.encrypted_content"], "prompt_cache_key": "s-1", "client_metadata": {"a": "b"},
            }  # fmt: skip
            answer = await client.post(f"{address}/v1/responses", json=body)
            assert answer.status_code == 200, answer.text
            data = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: ")]
            done = [event["item"] for event in data if event["type"] == "response.output_item.done"]
            # The CLI sends reasoning back sealed, and the answer to each call.
            history = history + [
                {k: v for k, v in item.items() if k != "content"} if item["type"] == "reasoning" else item
                for item in done
            ]
            history += [
                {"type": "function_call_output", "call_id": item["call_id"], "output": "a.txt"}
                for item in done
                if item["type"] == "function_call"
            ]
    assert done[-1]["content"][0]["text"] == "Done."
    assert data[-1]["response"]["usage"]["input_tokens_details"] == {"cached_tokens": 4, "cache_write_tokens": 0}
    turns = service.requests[1].messages
    assert [m.role for m in turns] == ["system", "system", "user", "user", "assistant", "tool"]
    assert turns[4].reasoning == "need ls" and turns[4].text == "Looking." and turns[4].tool_calls[0].id == "call_1"
    assert turns[:4] == service.requests[0].messages
