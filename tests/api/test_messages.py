"""Claims about POST /v1/messages and its token count."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given

from tests.api.fakes import (
    MODEL_ID,
    FakeGeneration,
    calls,
    client_for,
    finished,
    make_context,
    says,
    thinks,
)
from tests.api.test_bad_input import FUZZ, bodies
from vllm_mlx.api.anthropic.schemas import MessagesRequest
from vllm_mlx.errors import ContextLengthExceeded, EngineError, InvalidRequest, Overloaded, Unavailable
from vllm_mlx.generation.events import GenerationUsage, KeepAlive
from vllm_mlx.generation.request import MediaPart, TextPart
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta
from vllm_mlx.settings import Settings

PATH = "/v1/messages"


def body_of(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "max_tokens": 64, "messages": [{"role": "user", "content": "Hi"}], **fields}


async def ask(service: FakeGeneration, body: dict[str, Any], **context: Any):
    async with client_for(make_context(service, **context)) as client:
        return await client.post(PATH, json=body)


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of each event, whose name must be the data's type."""
    found = []
    for block in text.strip().split("\n\n"):
        if block.startswith(":"):
            continue  # a comment, which clients skip
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def folded(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Content blocks out of a stream, the way clients fold it; blocks are opened, filled and closed in turn."""
    blocks: list[dict[str, Any]] = []
    open_index = None
    for event in events:
        match event["type"]:
            case "content_block_start":
                assert open_index is None and event["index"] == len(blocks)
                open_index = event["index"]
                blocks.append({**event["content_block"], "_json": ""})
            case "content_block_delta":
                assert event["index"] == open_index
                delta, block = event["delta"], blocks[-1]
                match delta["type"]:
                    case "text_delta":
                        block["text"] += delta["text"]
                    case "thinking_delta":
                        block["thinking"] += delta["thinking"]
                    case "signature_delta":
                        block["signature"] = delta["signature"]
                    case "input_json_delta":
                        block["_json"] += delta["partial_json"]
            case "content_block_stop":
                assert event["index"] == open_index
                open_index = None
    assert open_index is None
    for block in blocks:
        if (text := block.pop("_json")) or block["type"] == "tool_use":
            block["input"] = json.loads(text or "{}")
    return blocks


async def test_a_whole_message_has_anthropics_shape():
    response = await ask(FakeGeneration(), body_of())
    message = response.json()
    assert response.headers["request-id"] == response.headers["x-request-id"]
    assert message["id"].startswith("msg_")
    assert message["type"] == "message" and message["role"] == "assistant" and message["model"] == MODEL_ID
    assert message["content"] == [{"type": "text", "text": "Hello world"}]
    assert message["stop_reason"] == "end_turn" and message["stop_sequence"] is None


async def test_events_come_in_the_exact_order():
    events = events_of((await ask(FakeGeneration(lambda r: thinks("hm", "yes")), body_of(stream=True))).text)
    assert [e["type"] for e in events] == [
        "message_start", "ping",
        "content_block_start", "content_block_delta", "content_block_delta", "content_block_stop",
        "content_block_start", "content_block_delta", "content_block_stop",
        "message_delta", "message_stop",
    ]  # fmt: skip
    start = events[0]["message"]
    assert start["content"] == [] and start["stop_reason"] is None and start["usage"]["input_tokens"] == 11
    assert events[2]["content_block"] == {"type": "thinking", "thinking": "", "signature": ""}
    assert events[4]["delta"]["type"] == "signature_delta" and events[4]["delta"]["signature"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}


@pytest.mark.parametrize(
    "script",
    [
        says("Hello", " world"),
        thinks("let me", "yes"),
        calls("f", '{"a":', " 1}"),
        [ReasoningDelta("r"), TextDelta("\n\n"), TextDelta("I will"), *calls("f", "{}", id="toolu_1")],
        [TextDelta("\n\n"), *calls("f", "{}")],
        says(),
        says("", "  "),
    ],
)
async def test_a_stream_folds_to_the_whole_message(script):
    service = FakeGeneration(lambda r: script)
    whole = (await ask(service, body_of())).json()
    events = events_of((await ask(service, body_of(stream=True))).text)
    blocks = folded(events)
    for block in (*blocks, *whole["content"]):
        if block["type"] == "tool_use" and block["id"] != "toolu_1":
            assert block.pop("id").startswith("toolu_")
    assert blocks == whole["content"]
    assert events[-2]["usage"] == whole["usage"] and events[-2]["delta"]["stop_reason"] == whole["stop_reason"]
    assert not any(b["type"] == "text" and not b["text"].strip() for b in blocks)


async def test_tool_use_carries_its_input_and_stop_reason():
    message = (await ask(FakeGeneration(lambda r: calls("get", '{"city": "Oslo"}')), body_of())).json()
    (block,) = message["content"]
    assert block["type"] == "tool_use" and block["name"] == "get" and block["input"] == {"city": "Oslo"}
    assert message["stop_reason"] == "tool_use"


@pytest.mark.parametrize(
    ("end", "reason", "sequence"),
    [
        (finished("stop"), "end_turn", None),
        (finished("stop", stop_sequence="END"), "stop_sequence", "END"),
        (finished("length"), "max_tokens", None),
        (finished("repetition", detail="pattern_loop_len_2"), "end_turn", None),
        (finished("repetition", is_cut=True), "max_tokens", None),
    ],
)
async def test_stop_reasons_are_translated(end, reason, sequence):
    service = FakeGeneration(lambda r: says("x", end=end))
    message = (await ask(service, body_of())).json()
    assert message["stop_reason"] == reason and message["stop_sequence"] == sequence
    delta = events_of((await ask(service, body_of(stream=True))).text)[-2]["delta"]
    assert delta == {"stop_reason": reason, "stop_sequence": sequence}


async def test_usage_parts_add_up_to_the_prompt():
    usage = GenerationUsage(1000, 7, num_cached_tokens=640)
    service = FakeGeneration(lambda r: says("x", end=finished(usage=usage)))
    for settings, created in (
        (Settings().with_values(cache__block_size=64), 960 - 640),
        (Settings().with_values(cache__prefix_cache=False), 0),
    ):
        found = (await ask(service, body_of(), settings=settings)).json()["usage"]
        assert found["cache_read_input_tokens"] == 640 and found["cache_creation_input_tokens"] == created
        assert sum(v for k, v in found.items() if k != "output_tokens") == 1000 and found["output_tokens"] == 7


async def test_every_field_reaches_the_generation_request():
    service = FakeGeneration()
    body = body_of(
        system=[
            {"type": "text", "text": "Be"},
            {"type": "text", "text": " brief", "cache_control": {"type": "ephemeral"}},
        ],
        messages=[
            {"role": "user", "content": [
                {"type": "text", "text": "Look"},
                {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA"}},
                {"type": "image", "source": {"type": "url", "url": "https://x/y.png"}},
                {"type": "document", "title": "T", "source": {"type": "text", "data": "D"}}]},
            {"role": "system", "content": "Plan mode is on"},
            {"role": "assistant", "content": [
                {"type": "thinking", "thinking": "hmm", "signature": "s"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "ok"},
                {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t1", "is_error": True,
                 "content": [{"type": "text", "text": "no"}]},
                {"type": "text", "text": "go on"}]},
        ],
        tools=[{"name": "f", "description": "d", "input_schema": {"type": "object"}, "cache_control": {}}],
        tool_choice={"type": "tool", "name": "f", "disable_parallel_tool_use": True},
        temperature=0.3, top_p=0.9, top_k=5, stop_sequences=["END"], metadata={"user_id": "u"},
        thinking={"type": "enabled", "budget_tokens": 2048}, output_config={"effort": "high"},
        context_management={"edits": [{"type": "clear_tool_uses_20250919", "keep": {"type": "tool_uses", "value": 3}},
                                      {"type": "clear_thinking_20251015", "keep": "all"}]}, service_tier="auto",
    )  # fmt: skip
    assert (await ask(service, body)).status_code == 200
    (request,) = service.requests
    roles = [m.role for m in request.messages]
    assert roles == ["system", "user", "system", "assistant", "tool", "user"]
    system, user, nudge, assistant, tool, after = request.messages
    assert system.text == "Be brief"
    assert user.parts[1] == MediaPart("image", "data:image/png;base64,AA", "messages.0.content.1.source.data")
    assert user.parts[2] == MediaPart("image", "https://x/y.png", "messages.0.content.2.source.url")
    assert user.parts[3] == TextPart("T\nD") and nudge.text == "Plan mode is on"
    assert assistant.reasoning == "hmm" and assistant.text == "ok"
    assert assistant.tool_calls[0].id == "t1" and json.loads(assistant.tool_calls[0].arguments) == {"a": 1}
    assert tool.tool_call_id == "t1" and tool.text == "Error: no" and after.text == "go on"
    assert request.tool_choice.mode == "named" and not request.parallel_tool_calls
    assert request.reasoning.enabled and request.reasoning.max_tokens == 2048 and request.reasoning.effort == "high"
    assert request.reasoning.keep_earlier is True
    assert request.sampling.temperature == 0.3 and request.sampling.top_k == 5
    assert request.stop == ("END",) and request.max_tokens == 64 and request.clamp_max_tokens


async def test_a_block_and_a_string_of_the_same_words_are_the_same_turn():
    service = FakeGeneration()
    for content in ("Hi", [{"type": "text", "text": "Hi"}]):
        await ask(service, body_of(messages=[{"role": "user", "content": content}], system=content))
    assert service.requests[0].messages == service.requests[1].messages


async def test_cache_control_changes_nothing():
    service = FakeGeneration()
    for extra in ({}, {"cache_control": {"type": "ephemeral"}}):
        await ask(service, body_of(messages=[{"role": "user", "content": [{"type": "text", "text": "Hi", **extra}]}]))
    assert service.requests[0].messages == service.requests[1].messages


@pytest.mark.parametrize(
    ("choice", "mode"),
    [(None, "auto"), ({"type": "auto"}, "auto"), ({"type": "any"}, "required"), ({"type": "none"}, "none")],
)
async def test_tool_choices_are_translated(choice, mode):
    service = FakeGeneration()
    await ask(service, body_of(tools=[{"name": "f", "input_schema": {}}], tool_choice=choice))
    assert service.requests[0].tool_choice.mode == mode


@pytest.mark.parametrize(
    ("thinking", "enabled", "budget"),
    [
        (None, None, None),
        ({"type": "adaptive"}, None, None),
        ({"type": "disabled"}, False, None),
        ({"type": "enabled", "budget_tokens": 1024}, True, 1024),
    ],
)
async def test_thinking_is_translated(thinking, enabled, budget):
    service = FakeGeneration()
    await ask(service, body_of(thinking=thinking))
    assert (service.requests[0].reasoning.enabled, service.requests[0].reasoning.max_tokens) == (enabled, budget)


async def test_words_put_in_the_assistants_mouth_are_continued():
    service = FakeGeneration()
    await ask(service, body_of(messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well,"}]))
    assert service.requests[0].continue_final_message


async def test_keep_alives_are_pings():
    service = FakeGeneration(lambda r: [KeepAlive("prefill"), *says("x")])
    events = events_of((await ask(service, body_of(stream=True))).text)
    assert [e["type"] for e in events[:3]] == ["message_start", "ping", "ping"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (Overloaded("full"), 429, "rate_limit_error"),
        (Unavailable("down"), 503, "overloaded_error"),
        (EngineError("broken"), 500, "api_error"),
        (RuntimeError("secret"), 500, "api_error"),
    ],
)
async def test_errors_have_anthropics_shape(stream, error, status, kind):
    response = await ask(FakeGeneration(refusal=error), body_of(stream=stream))
    body = response.json()
    assert response.status_code == status and body["type"] == "error" and body["error"]["type"] == kind
    assert body["request_id"] == response.headers["request-id"] and "secret" not in response.text


async def test_a_prompt_that_is_too_long_is_told_in_the_words_agents_look_for():
    error = ContextLengthExceeded(num_prompt_tokens=5000, max_tokens=10, context_tokens=4096)
    body = (await ask(FakeGeneration(refusal=error), body_of())).json()
    assert body["error"]["message"] == "prompt is too long: 5000 tokens > 4096 maximum"


async def test_an_error_after_the_headers_is_the_last_event():
    response = await ask(FakeGeneration(lambda r: [TextDelta("a"), EngineError("broken")]), body_of(stream=True))
    last = events_of(response.text)[-1]
    assert last["type"] == "error" and last["error"] == {"type": "api_error", "message": "broken"}


async def test_diagnostics_come_when_asked_for():
    service = FakeGeneration(lambda r: says("x", end=finished(diagnostics={"queue": 1, "runtime": {}})))
    assert "diagnostics" not in (await ask(service, body_of())).json()
    whole = (await ask(service, body_of(include_diagnostics=True))).json()["diagnostics"]
    assert whole == {"level": "basic", "queue": 1}
    events = events_of((await ask(service, body_of(diagnostics_level="deep", stream=True))).text)
    assert events[-2]["diagnostics"] == {"level": "deep", "queue": 1, "runtime": {}}


async def test_counted_tokens_are_those_of_the_same_prompt():
    service = FakeGeneration()
    async with client_for(make_context(service)) as client:
        body = body_of(system="S")
        counted = (await client.post(f"{PATH}/count_tokens", json=body)).json()
        del body["max_tokens"]
        assert (await client.post(f"{PATH}/count_tokens?beta=true", json=body)).json() == counted
    assert counted == {"input_tokens": 1 + len("SHi")}


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("max_tokens", None, "max_tokens"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", "x", "max_tokens"),
        ("messages", [], "messages"),
        ("messages", "Hi", "messages"),
        ("messages", [{"role": "tool", "content": "x"}], "messages.0.role"),
        ("messages", [{"role": "user", "content": 5}], "messages.0.content"),
        ("messages", [{"role": "user"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": [{"type": "odd"}]}], "messages.0.content.0"),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
        ("messages", [{"role": "user", "content": [{"type": "image", "source": {"type": "file"}}]}],
         "messages.0.content.0.source"),
        ("messages", [{"role": "user", "content": [{"type": "document", "source": {"type": "base64"}}]}], "PDF"),
        ("messages", [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "messages.0.content.0"),
        ("messages", [{"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "x"}]}],
         "messages.0.content.0"),
        ("messages", [{"role": "assistant", "content": [{"type": "tool_use", "id": "a", "name": "f", "input": "x"}]}],
         "messages.0.content.0.input"),
        ("system", 5, "system"),
        ("system", [{"type": "image"}], "system.0"),
        ("tools", [{"name": "f"}], "tools.0.input_schema"),
        ("tools", [{"type": "web_search_20250305", "name": "web_search"}], "tools.0.type"),
        ("tools", [{"name": "f", "input_schema": {}}] * 2, "tools.1.name"),
        ("tool_choice", {"type": "tool", "name": "g"}, "tool_choice.name"),
        ("tool_choice", {"type": "any"}, "tool_choice"),
        ("tool_choice", "auto", "tool_choice"),
        ("thinking", {"type": "enabled", "budget_tokens": 0}, "thinking.budget_tokens"),
        ("thinking", True, "thinking"),
        ("temperature", -0.1, "temperature"),
        ("temperature", "x", "temperature"),
        ("top_p", 2, "top_p"),
        ("top_k", "x", "top_k"),
        ("stop_sequences", "x", "stop_sequences"),
        ("stop_sequences", [" "], "stop_sequences"),
        ("stream", "x", "stream"),
        ("output_config", {"effort": "huge"}, "output_config.effort"),
        ("context_management", {"edits": [{}]}, "context_management.edits.0.type"),
        ("mcp_servers", [{"url": "x"}], "mcp_servers"),
        ("container", "c", "container"),
    ],
)  # fmt: skip
async def test_each_wrong_field_is_a_400_in_anthropics_shape_that_names_it(field, value, words):
    body = body_of(**{field: value})
    if value is None:
        del body[field]
    response = await ask(FakeGeneration(), body)
    assert response.status_code == 400, response.text
    error = response.json()
    assert error["type"] == "error" and error["error"]["type"] == "invalid_request_error"
    assert words in error["error"]["message"], error


async def test_a_result_must_name_a_call_that_was_made():
    result = {"type": "tool_result", "tool_use_id": "toolu_9", "content": "x"}
    response = await ask(FakeGeneration(), body_of(messages=[{"role": "user", "content": [result]}]))
    assert response.status_code == 400
    assert "messages.0.content.0.tool_use_id" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("param", "expected"),
    [
        ("tools.1.function.parameters", "tools.1.input_schema"),
        ("stop.0", "stop_sequences.0"),
        ("response_format", "output_config.format.schema"),
        ("reasoning_effort", "output_config.effort"),
        ("messages.1.content", "messages.1.content"),
    ],
)
async def test_what_the_service_refuses_is_named_as_this_protocol_names_it(param, expected):
    async with client_for(make_context(FakeGeneration(refusal=InvalidRequest("No.", param=param)))) as client:
        message = (await client.post(PATH, json=body_of())).json()["error"]["message"]
    assert message == f"{expected}: No."


async def test_no_part_of_the_usage_is_nought_while_it_is_untold():
    """Clients take an `input_tokens` of 0 for one that was not sent, and go back to the whole prompt's."""
    for cached in (0, 16, 31):
        usage = GenerationUsage(32, 7, num_cached_tokens=cached)
        service = FakeGeneration(lambda r, usage=usage: says("x", end=finished(usage=usage)))
        found = (await ask(service, body_of())).json()["usage"]
        assert found["input_tokens"] >= 1
        assert sum(v for k, v in found.items() if k != "output_tokens") == 32


async def test_what_tools_at_anthropic_did_is_left_out_of_a_history():
    service = FakeGeneration()
    history = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [
            {"type": "server_tool_use", "id": "s1", "name": "web_search", "input": {}},
            {"type": "web_search_tool_result", "tool_use_id": "s1", "content": []},
            {"type": "text", "text": "found"}]},
        {"role": "user", "content": "And?"},
    ]  # fmt: skip
    assert (await ask(service, body_of(messages=history))).status_code == 200
    assert [m.text for m in service.requests[0].messages] == ["Hi", "found", "And?"]


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("all", True), ({"type": "thinking_turns", "value": 3}, True), ({"type": "thinking_turns", "value": 1}, False),
     (None, None), (5, False)],
)  # fmt: skip
async def test_clear_thinking_says_whether_earlier_thinking_is_kept(keep, kept):
    service = FakeGeneration()
    edit = {"type": "clear_thinking_20251015", **({} if keep is None else {"keep": keep})}
    await ask(service, body_of(context_management={"edits": [edit]}))
    assert service.requests[0].reasoning.keep_earlier is kept


@FUZZ
@given(body=bodies(MessagesRequest, body_of()))
async def test_no_messages_body_whatsoever_is_a_500(body):
    response = await ask(FakeGeneration(), body)
    assert response.status_code < 500, (body, response.text)
