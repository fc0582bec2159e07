"""Claims about /v1/responses: shape, event order, items both ways, what is kept, and what is refused."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from hypothesis import given

from tests.api.fakes import MODEL_ID, FakeGeneration, calls, client_for, finished, make_context, says, thinks, until
from tests.api.test_bad_input import FUZZ, assert_openai_error, bodies
from vllm_mlx.api.openai.responses_schemas import ResponsesRequest
from vllm_mlx.errors import ContextLengthExceeded, EngineError, InvalidRequest
from vllm_mlx.generation.events import GenerationUsage
from vllm_mlx.generation.request import MediaPart, TextPart
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted

PATH = "/v1/responses"
SHELL = {"type": "function", "name": "shell", "parameters": {"type": "object", "properties": {"cmd": {}}}}
PATCH = {"type": "custom", "name": "patch", "format": {"type": "grammar", "syntax": "lark", "definition": "start: X"}}
AGENTS = {"type": "namespace", "name": "agents", "description": "d", "tools": [{**SHELL, "name": "spawn"}, PATCH]}
SEARCH = {"type": "web_search", "external_web_access": False}


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "input": "Hi", **fields}


async def ask(service: FakeGeneration, body: dict[str, Any], **context: Any):
    async with client_for(make_context(service, **context)) as client:
        return await client.post(PATH, json=body)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event: its name is the data's type, and the numbers count from nought."""
    found = []
    for block in text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    assert [event["sequence_number"] for event in found] == list(range(len(found)))
    return found


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Output items out of the deltas alone, the way a client shows them while they come."""
    items: list[dict[str, Any]] = []
    for event in events:
        kind = event["type"].removeprefix("response.")
        if kind == "output_item.added":
            assert event["output_index"] == len(items)
            items.append({**event["item"], "text": ""})
        elif kind.endswith(".delta"):
            assert event["item_id"] == items[event["output_index"]]["id"]
            items[event["output_index"]]["text"] += event["delta"]
    return items


def whole_text(item: dict[str, Any]) -> str:
    return item.get("arguments") or item.get("input") or "".join(part["text"] for part in item.get("content", ()))


def alike(value: Any) -> Any:
    """Without what differs from run to run."""
    if isinstance(value, dict):
        return {k: alike(v) for k, v in value.items() if k not in ("id", "created_at", "completed_at", "call_id")}
    return [alike(v) for v in value] if isinstance(value, list) else value


# --- the answer ----------------------------------------------------------------------------------------------------


async def test_a_whole_response_has_openais_shape():
    usage = GenerationUsage(1000, 7, num_cached_tokens=640, num_reasoning_tokens=3)
    service = FakeGeneration(lambda r: says("Hello", " world", end=finished(usage=usage)))
    response = (await ask(service, body_of(metadata={"a": "b"}, temperature=0.5))).json()
    assert response["id"].startswith("resp_") and response["object"] == "response"
    assert response["status"] == "completed" and response["error"] is response["incomplete_details"] is None
    (message,) = response["output"]
    assert message["type"] == "message" and message["role"] == "assistant" and message["status"] == "completed"
    assert message["content"] == [{"type": "output_text", "text": "Hello world", "annotations": [], "logprobs": []}]
    assert response["usage"] == {
        "input_tokens": 1000,
        "input_tokens_details": {"cached_tokens": 640, "cache_write_tokens": 992 - 640},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 3},
        "total_tokens": 1007,
    }
    assert response["metadata"] == {"a": "b"} and response["temperature"] == 0.5 and response["store"] is True


async def test_events_come_in_the_official_order():
    script = [ReasoningDelta("hm"), TextDelta("yes"), TextDelta("!"), *calls("shell", '{"cmd"', ': "ls"}', id="call_1")]
    text = (await ask(FakeGeneration(lambda r: script), body_of(stream=True, tools=[SHELL]))).text
    events = events_of(text)
    part = ["content_part.added", "{0}.delta", "{0}.done", "content_part.done"]
    assert [event["type"].removeprefix("response.") for event in events] == [
        "created", "in_progress",
        "output_item.added", *(p.format("reasoning_text") for p in part), "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta", "output_text.delta", "output_text.done",
        "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip
    assert events[0]["response"]["status"] == "in_progress" and events[0]["response"]["output"] == []
    assert events[-1]["response"]["output"] == [e["item"] for e in events if e["type"].endswith("output_item.done")]
    call = events[-1]["response"]["output"][-1]
    assert (call["call_id"], call["name"], call["arguments"]) == ("call_1", "shell", '{"cmd": "ls"}')
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    "script",
    [
        says("Hello", " world"),
        thinks("let me", "yes"),
        calls("shell", '{"cmd":', " 1}"),
        calls("agents__spawn", "{}"),
        calls("agents__patch", '{"input": ', '"*** Begin"}'),
        [ReasoningDelta("r"), TextDelta("\n\n"), *calls("shell")],
        [ToolCallStarted(0, "shell", None), ToolCallDelta(0, "{"), ToolCallEnded(0, False), finished("length")],
        says(),
        says("", "  "),
    ],
)
async def test_a_stream_folds_to_the_whole_response(script):
    tools = [SHELL, AGENTS]
    whole = (await ask(FakeGeneration(lambda r: script), body_of(tools=tools))).json()
    events = events_of((await ask(FakeGeneration(lambda r: script), body_of(tools=tools, stream=True))).text)
    assert alike(events[-1]["response"]) == alike(whole)
    assert [item["text"] for item in folded(events)] == [whole_text(item) for item in whole["output"]]


async def test_a_namespaced_or_custom_call_is_told_as_the_client_named_it():
    script = [
        *calls("agents__spawn", "{}")[:-1],
        *calls("agents__patch", '{"input": "*** Begin"}', id="call_2"),
    ]
    output = (await ask(FakeGeneration(lambda r: script), body_of(tools=[AGENTS]))).json()["output"]
    assert [(i["type"], i["namespace"], i["name"]) for i in output] == [
        ("function_call", "agents", "spawn"),
        ("custom_tool_call", "agents", "patch"),
    ]
    assert output[1]["input"] == "*** Begin" and output[1]["call_id"] == "call_2"


@pytest.mark.parametrize(
    ("end", "status", "details"),
    [
        (finished("stop"), "completed", None),
        (finished("length"), "incomplete", {"reason": "max_output_tokens"}),
        (finished("repetition", detail="loop"), "completed", None),
        (finished("repetition", is_cut=True), "incomplete", {"reason": "max_output_tokens"}),
    ],
)
async def test_the_end_is_told_by_status_and_last_event(end, status, details):
    service = FakeGeneration(lambda r: says("x", end=end))
    response = (await ask(service, body_of())).json()
    assert response["status"] == status and response["incomplete_details"] == details
    last = events_of((await ask(service, body_of(stream=True))).text)[-1]
    assert last["type"] == f"response.{status}"
    assert response.get("stop_reason") == ("repetition_detected" if end.reason == "repetition" else None)


async def test_a_failure_after_the_start_is_a_failed_response_and_before_it_a_status():
    service = FakeGeneration(lambda r: [TextDelta("a"), EngineError("Broken.")])
    last = events_of((await ask(service, body_of(stream=True))).text)[-1]
    assert last["type"] == "response.failed" and last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "Broken."}
    assert last["response"]["output"][0]["status"] == "incomplete"
    assert_openai_error(await ask(service, body_of()), 500)
    refusal = ContextLengthExceeded(num_prompt_tokens=9, max_tokens=1, context_tokens=5)
    error = assert_openai_error(await ask(FakeGeneration(refusal=refusal), body_of(stream=True)), 400, "input")
    assert error["code"] == "context_length_exceeded"


async def test_diagnostics_come_when_asked_for():
    service = FakeGeneration(lambda r: says("x", end=finished(diagnostics={"runtime": 1, "prompt": 2})))
    assert "diagnostics" not in (await ask(service, body_of())).json()
    assert (await ask(service, body_of(include_diagnostics=True))).json()["diagnostics"] == {
        "level": "basic",
        "prompt": 2,
    }


# --- the request ---------------------------------------------------------------------------------------------------


async def asked(**fields: Any):
    service = FakeGeneration()
    response = await ask(service, body_of(**fields))
    assert response.status_code == 200, response.text
    return service.requests[0], response.json()


async def test_fields_reach_the_generation():
    request, _ = await asked(
        instructions="Be brief",
        max_output_tokens=9,
        temperature=0.5,
        top_p=0,
        parallel_tool_calls=False,
        reasoning={"effort": "low", "summary": "auto"},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}}},
        timeout=3,
        max_thinking_tokens=5,
    )
    assert [(m.role, m.text) for m in request.messages] == [("system", "Be brief"), ("user", "Hi")]
    assert request.max_tokens == 9 and request.clamp_max_tokens and not request.parallel_tool_calls
    assert request.reasoning.effort == "low" and request.reasoning.max_tokens == 5 and request.timeout_s == 3
    assert request.output_format.kind == "json_schema" and request.sampling.temperature == 0.5
    assert 0 < request.sampling.top_p < 1e-3
    request, _ = await asked(reasoning={"effort": "none"})
    assert request.reasoning.enabled is False and request.reasoning.effort is None


async def test_items_that_follow_one_another_are_one_assistant_turn():
    request, _ = await asked(
        input=[
            {"role": "developer", "content": "rules"},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "do"}]},
            {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "ok"}]},
            {"type": "function_call", "call_id": "c1", "name": "shell", "arguments": "{}", "status": "completed"},
            {"type": "custom_tool_call", "call_id": "c2", "namespace": "agents", "name": "patch", "input": "p"},
            {"type": "function_call_output", "call_id": "c1", "output": "out"},
            {"type": "custom_tool_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "two"}]},
        ],
        tools=[SHELL, AGENTS],
    )
    assert [m.role for m in request.messages] == ["system", "user", "assistant", "tool", "tool"]
    turn = request.messages[2]
    assert turn.reasoning == "hm" and turn.text == "ok"
    assert [(c.name, c.arguments) for c in turn.tool_calls] == [("shell", "{}"), ("agents__patch", '{"input":"p"}')]
    assert [(m.tool_call_id, m.text) for m in request.messages[3:]] == [("c1", "out"), ("c2", "two")]


async def test_images_stand_where_they_were_sent():
    picture = {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"}
    request, _ = await asked(
        input=[{"role": "user", "content": [{"type": "input_text", "text": "a"}, picture]}]
    )
    parts = request.messages[0].parts
    assert parts[0] == TextPart("a") and isinstance(parts[1], MediaPart) and parts[1].options == {"detail": "low"}


async def test_tools_of_every_kind_are_taken_and_hosted_ones_left_out_with_a_note():
    request, response = await asked(tools=[SHELL, PATCH, AGENTS, SEARCH, {"type": "whatever_next"}])
    assert [t.name for t in request.tools] == ["shell", "patch", "agents__spawn", "agents__patch"]
    assert "lark" in request.tools[1].description and "start: X" in request.tools[1].description
    assert [tool["type"] for tool in response["tools"]] == [
        "function", "custom", "namespace", "web_search", "whatever_next",
    ]  # fmt: skip
    assert any("web_search" in note for note in response["notes"])
    request, response = await asked(input=[{"role": "user", "content": "a"}, {"type": "web_search_call", "id": "ws"}])
    assert len(request.messages) == 1 and "web_search_call" in response["notes"][0]


@pytest.mark.parametrize(
    ("choice", "mode", "name", "num_tools"),
    [
        ("auto", "auto", None, 3),
        ("none", "none", None, 3),
        ("required", "required", None, 3),
        ({"type": "function", "name": "shell"}, "named", "shell", 3),
        ({"type": "function", "name": "spawn"}, "named", "agents__spawn", 3),
        ({"type": "function", "namespace": "agents", "name": "spawn"}, "named", "agents__spawn", 3),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "shell"}]},
         "required", None, 1),
    ],
)  # fmt: skip
async def test_tool_choices(choice, mode, name, num_tools):
    request, response = await asked(tools=[SHELL, AGENTS], tool_choice=choice)
    assert (request.tool_choice.mode, request.tool_choice.name) == (mode, name) and len(request.tools) == num_tools
    assert response["tool_choice"] == choice


async def test_sealed_reasoning_comes_back_as_it_was():
    service = FakeGeneration(lambda r: thinks("hm, gruß", "yes"))
    body = body_of(include=["reasoning.encrypted_content"], store=False)
    reasoning = (await ask(service, body)).json()["output"][0]
    assert "hm" not in reasoning["encrypted_content"]
    back = {k: reasoning[k] for k in ("type", "id", "summary", "encrypted_content")}
    await ask(service, body_of(input=[back, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "?"}]))
    assert service.requests[-1].messages[0].reasoning == "hm, gruß"
    foreign = {**back, "encrypted_content": "gAAAA", "summary": [{"type": "summary_text", "text": "short"}]}
    await ask(service, body_of(input=[foreign, {"role": "user", "content": "?"}]))
    assert service.requests[-1].messages[0].reasoning == "short"


WRONG_FIELDS = [
    ("input", None, "input"),
    ("input", [], "input"),
    ("input", 5, "input"),
    ("input", ["hi"], "input.0"),
    ("input", [{}], "input.0.role"),
    ("input", [{"role": "robot", "content": "x"}], "input.0.role"),
    ("input", [{"role": "user"}], "input.0.content"),
    ("input", [{"role": "user", "content": [{"type": "smell"}]}], "input.0.content.0"),
    ("input", [{"role": "user", "content": [{"type": "input_text"}]}], "input.0.content.0.text"),
    ("input", [{"role": "user", "content": [{"type": "input_image"}]}], "input.0.content.0.image_url"),
    ("input", [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}], "input.0.content.0.file_id"),
    ("input", [{"role": "assistant", "content": [{"type": "input_image", "image_url": "x"}]}], "input.0.content.0"),
    ("input", [{"type": "smoke_signal"}], "input.0"),
    ("input", [{"type": "item_reference", "id": "x"}], "input.0"),
    ("input", [{"type": "function_call", "name": "f", "arguments": "{}"}], "input.0.call_id"),
    ("input", [{"type": "function_call", "call_id": "c", "name": "f", "arguments": {}}], "input.0.arguments"),
    ("input", [{"type": "function_call_output", "call_id": "c", "output": "x"}], "input.0.call_id"),
    ("model", 5, "model"),
    ("instructions", 5, "instructions"),
    ("previous_response_id", "resp_unknown", "previous_response_id"),
    ("stream", "yes", "stream"),
    ("store", "no", "store"),
    ("stream_options", {"include_obfuscation": True}, "stream_options.include_obfuscation"),
    ("tools", {}, "tools"),
    ("tools", [{}], "tools.0.type"),
    ("tools", [{"type": "function"}], "tools.0.name"),
    ("tools", [{"type": "function", "name": "f", "parameters": 5}], "tools.0.parameters"),
    ("tools", [SHELL, SHELL], "tools.1.name"),
    ("tools", [{"type": "namespace", "name": "n", "tools": [{"type": "web"}]}], "tools.0.tools.0"),
    ("tool_choice", "maybe", "tool_choice"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", {"type": "function", "name": "g"}, "tool_choice.name"),
    ("parallel_tool_calls", "no", "parallel_tool_calls"),
    ("text", {"format": {"type": "xml"}}, "text.format.type"),
    ("text", {"format": {"type": "json_schema", "name": "n"}}, "text.format.schema"),
    ("text", {"verbosity": "loud"}, "text.verbosity"),
    ("reasoning", {"effort": "extreme"}, "reasoning.effort"),
    ("include", ["everything"], "include.0"),
    ("include", ["message.output_text.logprobs"], "include"),
    ("max_output_tokens", 0, "max_output_tokens"),
    ("max_output_tokens", "many", "max_output_tokens"),
    ("temperature", -1, "temperature"),
    ("top_p", 1.5, "top_p"),
    ("metadata", {"a": 1}, "metadata.a"),
    ("prompt_cache_key", 5, "prompt_cache_key"),
    ("truncation", "middle", "truncation"),
    ("service_tier", "priority", "service_tier"),
    ("background", True, "background"),
    ("conversation", "conv_1", "conversation"),
    ("prompt", {"id": "pmpt_1"}, "prompt"),
    ("top_logprobs", 3, "top_logprobs"),
    ("timeout", 0, "timeout"),
    ("diagnostics_level", "all", "diagnostics_level"),
    ("repetition_policy_override", "wild", "repetition_policy_override"),
    ("chat_template_kwargs", {"enable_thinking": "yes"}, "chat_template_kwargs.enable_thinking"),
]


@pytest.mark.parametrize(("field", "value", "param"), WRONG_FIELDS)
async def test_each_wrong_field_is_a_400_that_names_it(field, value, param):
    assert_openai_error(await ask(FakeGeneration(), body_of(**{field: value})), 400, param)


async def test_what_the_service_refuses_is_named_as_this_protocol_names_it():
    for param, expected in (
        ("tools.1.function.parameters", "tools.0.tools.1.parameters"),
        ("messages.3.content", "input"),
        ("max_tokens", "max_output_tokens"),
        ("response_format", "text.format.schema"),
    ):
        service = FakeGeneration(refusal=InvalidRequest("No.", param=param))
        assert_openai_error(await ask(service, body_of(tools=[AGENTS])), 400, expected)


@FUZZ
@given(bodies(ResponsesRequest, required={"input": "Hi"}))
async def test_no_body_is_a_500(body):
    response = await ask(FakeGeneration(), body)
    assert response.status_code in (200, 400, 404), response.text


# --- what is kept --------------------------------------------------------------------------------------------------


async def test_a_conversation_goes_on_from_a_stored_response():
    service = FakeGeneration(lambda r: calls("shell", "{}", id="c1") if len(r.messages) == 1 else thinks("hm", "done"))
    async with client_for(make_context(service)) as client:
        first = (await client.post(PATH, json=body_of(tools=[SHELL]))).json()
        result = [{"type": "function_call_output", "call_id": "c1", "output": "files"}]
        second = (await client.post(PATH, json=body_of(input=result, previous_response_id=first["id"]))).json()
        third = (await client.post(PATH, json=body_of(input="And?", previous_response_id=second["id"]))).json()
        listed = (await client.get(f"{PATH}/{third['id']}/input_items", params={"order": "asc", "limit": 4})).json()
    said = [(m.role, m.text, len(m.tool_calls), m.reasoning) for m in service.requests[-1].messages]
    assert said == [
        ("user", "Hi", 0, None), ("assistant", "", 1, None), ("tool", "files", 0, None),
        ("assistant", "done", 0, "hm"), ("user", "And?", 0, None),
    ]  # fmt: skip
    assert [item["type"] for item in listed["data"]] == [
        "message", "function_call", "function_call_output", "reasoning",
    ]  # fmt: skip
    assert listed["has_more"] and listed["first_id"] == listed["data"][0]["id"]


async def test_pages_of_input_items_follow_each_other():
    items = [{"role": "user", "content": str(i)} for i in range(5)]
    async with client_for(make_context()) as client:
        id = (await client.post(PATH, json=body_of(input=items))).json()["id"]
        texts, after = [], None
        while True:
            params = {"limit": 2, **({"after": after} if after else {})}
            page = (await client.get(f"{PATH}/{id}/input_items", params=params)).json()
            texts += [item["content"][0]["text"] for item in page["data"]]
            if not page["has_more"]:
                break
            after = page["last_id"]
        assert_openai_error(await client.get(f"{PATH}/{id}/input_items", params={"after": "x"}), 400, "after")
        assert_openai_error(await client.get(f"{PATH}/{id}/input_items", params={"limit": 0}), 400, "limit")
        assert_openai_error(await client.get(f"{PATH}/none/input_items"), 404)
    assert texts == ["4", "3", "2", "1", "0"]


async def test_stored_responses_are_retrieved_deleted_and_not_kept_with_store_false():
    async with client_for(make_context()) as client:
        kept = (await client.post(PATH, json=body_of())).json()
        assert (await client.get(f"{PATH}/{kept['id']}")).json() == kept
        assert_openai_error(await client.post(f"{PATH}/{kept['id']}/cancel"), 400, "response_id")
        assert_openai_error(await client.get(f"{PATH}/{kept['id']}", params={"stream": "true"}), 400, "stream")
        assert (await client.delete(f"{PATH}/{kept['id']}")).json()["deleted"] is True
        for answer in (
            await client.get(f"{PATH}/{kept['id']}"),
            await client.delete(f"{PATH}/{kept['id']}"),
            await client.post(f"{PATH}/{kept['id']}/cancel"),
        ):
            assert_openai_error(answer, 404)
        passing = (await client.post(PATH, json=body_of(store=False))).json()
        assert_openai_error(await client.get(f"{PATH}/{passing['id']}"), 404)


async def test_one_keys_responses_are_not_anothers():
    context = make_context(api_keys={"a": "key-a", "b": "key-b"})
    mine, other = ({"authorization": f"Bearer key-{name}"} for name in "ab")
    async with client_for(context) as client:
        id = (await client.post(PATH, json=body_of(), headers=mine)).json()["id"]
        assert (await client.get(f"{PATH}/{id}", headers=mine)).status_code == 200
        for path in (f"{PATH}/{id}", f"{PATH}/{id}/input_items"):
            assert_openai_error(await client.get(path, headers=other), 404)
        assert_openai_error(await client.delete(f"{PATH}/{id}", headers=other), 404)
        body = body_of(previous_response_id=id)
        assert_openai_error(await client.post(PATH, json=body, headers=other), 400, "previous_response_id")


async def test_a_running_response_can_be_looked_at_and_cancelled():
    service = FakeGeneration()

    def script(request):
        return [TextDelta("so far"), service.cancel_events[request.id].wait, finished("cancelled")]

    service.script = script
    async with client_for(make_context(service)) as client:
        asking = asyncio.create_task(client.post(PATH, json=body_of()))
        await until(lambda: bool(service.running))
        id = next(iter(service.running))
        assert (await client.get(f"{PATH}/{id}")).json()["status"] == "in_progress"
        cancelled = (await client.post(f"{PATH}/{id}/cancel")).json()
        assert cancelled["id"] == id and cancelled["status"] == "cancelled"
        answer = (await asking).json()
        assert answer["status"] == "cancelled" and answer["output"][0]["content"][0]["text"] == "so far"
        assert (await client.get(f"{PATH}/{id}")).json()["status"] == "cancelled"


async def test_input_tokens_are_counted():
    async with client_for(make_context()) as client:
        counted = (await client.post(f"{PATH}/input_tokens", json=body_of(instructions="abc"))).json()
        assert counted == {"object": "response.input_tokens", "input_tokens": 6}
        assert_openai_error(await client.post(f"{PATH}/input_tokens", json={}), 400, "input")
