"""Claims about wrong requests: each is a 4xx in its protocol's shape that names the field, and none is ever a 500."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from tests.api.fakes import FakeGeneration, chat_body, client_for, make_context
from vllm_mlx.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from vllm_mlx.errors import ContextLengthExceeded

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def assert_openai_error(response: httpx.Response, status: int, param: str | None = None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    if param is not None:
        assert error["param"] == param
    return error


async def post(path: str, body: Any) -> httpx.Response:
    async with client_for(make_context()) as client:
        return await client.post(path, json=body)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"{", "JSON"),
        (b"{} {}", "JSON"),
        (b"[]", "object"),
        (b"null", "object"),
        (b'"text"', "object"),
        (b'{"messages": "\xff\xfe"}', "UTF-8"),
        (b'{"messages": NaN}', "JSON"),
        (b'{"a": "\\ud800"}', "JSON"),
        (b"\x00", "JSON"),
        (b'{"a":' * 2000 + b"1" + b"}" * 2000, ""),
        (b'{"tools":' + b"[" * 200 + b"]" * 200 + b"}", "levels"),
    ],
)
async def test_a_body_that_is_no_json_object_is_a_400_that_says_why(path, content, words):
    async with client_for(make_context()) as client:
        error = assert_openai_error(await client.post(path, content=content), 400)
    assert words in error["message"]


async def test_the_content_type_does_not_matter():
    async with client_for(make_context()) as client:
        for content_type in ("text/plain", "application/x-www-form-urlencoded", "nonsense"):
            response = await client.post(CHAT, content=json.dumps(chat_body()), headers={"content-type": content_type})
            assert response.status_code == 200


WRONG_CHAT_FIELDS = [
    ("messages", "hi", "messages"),
    ("messages", [], "messages"),
    ("messages", ["hi"], "messages.0"),
    ("messages", [{}], "messages.0.role"),
    ("messages", [{"role": "robot", "content": "x"}], "messages.0.role"),
    ("messages", [{"role": "user"}], "messages.0.content"),
    ("messages", [{"role": "user", "content": None}], "messages.0.content"),
    ("messages", [{"role": "user", "content": 5}], "messages.0.content"),
    ("messages", [{"role": "user", "content": [{}]}], "messages.0.content.0"),
    ("messages", [{"role": "user", "content": [{"type": "smell"}]}], "messages.0.content.0"),
    ("messages", [{"role": "user", "content": [{"type": "text"}]}], "messages.0.content.0.text"),
    ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
     "messages.0.content.0.image_url.url"),
    ("messages", [{"role": "assistant", "content": [{"type": "image_url", "image_url": "x"}]}],
     "messages.0.content.0.image_url"),
    ("messages", [{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}],
     "messages.0.tool_calls"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {}}]}], "messages.0.tool_calls.0.function.name"),
    ("messages", [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 3}}]}],
     "messages.0.tool_calls.0.function.arguments"),
    ("model", 5, "model"),
    ("stream", "yes", "stream"),
    ("stream_options", {"include_usage": True}, "stream_options"),
    ("n", 0, "n"),
    ("n", "2", "n"),
    ("n", 1000, "n"),
    ("temperature", -1, "temperature"),
    ("temperature", "hot", "temperature"),
    ("temperature", 1e400, None),
    ("top_p", 1.5, "top_p"),
    ("top_k", -2, "top_k"),
    ("min_p", 2, "min_p"),
    ("seed", 1.5, "seed"),
    ("seed", 2**65, "seed"),
    ("presence_penalty", 3, "presence_penalty"),
    ("frequency_penalty", -3, "frequency_penalty"),
    ("repetition_penalty", 0, "repetition_penalty"),
    ("logit_bias", {"a": 1}, "logit_bias.a"),
    ("logit_bias", {"1": 101}, "logit_bias.1"),
    ("logit_bias", [1], "logit_bias"),
    ("stop", 5, "stop"),
    ("stop", [5], "stop.0"),
    ("stop", "", "stop"),
    ("stop", ["x"] * 65, "stop"),
    ("stop_token_ids", ["x"], "stop_token_ids.0"),
    ("max_tokens", -5, "max_tokens"),
    ("max_tokens", 0, "max_tokens"),
    ("max_tokens", 2**40, "max_tokens"),
    ("max_tokens", "many", "max_tokens"),
    ("max_tokens", True, "max_tokens"),
    ("max_completion_tokens", 1.5, "max_completion_tokens"),
    ("min_tokens", -1, "min_tokens"),
    ("logprobs", 5, "logprobs"),
    ("top_logprobs", 5, "top_logprobs"),
    ("timeout", 0, "timeout"),
    ("timeout", "soon", "timeout"),
    ("priority", "high", "priority"),
    ("diagnostics_level", "all", "diagnostics_level"),
    ("repetition_policy_override", "wild", "repetition_policy_override"),
    ("tools", {}, "tools"),
    ("tools", [{"type": "function"}], "tools.0.function"),
    ("tools", [{"type": "web", "function": {"name": "f"}}], "tools.0.type"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": 5}}], "tools.0.function.parameters"),
    ("tools", [{"type": "function", "function": {"name": "f"}}] * 2, "tools.1.function.name"),
    ("tool_choice", "maybe", "tool_choice"),
    ("tool_choice", "required", "tool_choice"),
    ("tool_choice", {"type": "function", "function": {"name": "g"}}, "tool_choice.function.name"),
    ("response_format", {"type": "xml"}, "response_format.type"),
    ("response_format", {"type": "json_schema"}, "response_format.json_schema"),
    ("response_format", "json", "response_format"),
    ("guided_json", "{", "guided_json"),
    ("guided_choice", [], "guided_choice"),
    ("structured_outputs", {"json": 5}, "structured_outputs.json"),
    ("chat_template_kwargs", "x", "chat_template_kwargs"),
    ("chat_template_kwargs", {"enable_thinking": "yes"}, "chat_template_kwargs.enable_thinking"),
    ("enable_thinking", "no", "enable_thinking"),
    ("max_thinking_tokens", -1, "max_thinking_tokens"),
    ("reasoning_effort", "extreme", "reasoning_effort"),
    ("continue_final_message", True, "continue_final_message"),
    ("add_generation_prompt", False, "add_generation_prompt"),
    ("video_fps", 0, "video_fps"),
    # Known elsewhere, not served here.
    ("functions", [{"name": "f"}], "functions"),
    ("modalities", ["text", "audio"], "modalities"),
    ("audio", {"voice": "x"}, "audio"),
    ("store", True, "store"),
    ("service_tier", "flex", "service_tier"),
    ("web_search_options", {}, "web_search_options"),
    ("best_of", 3, "best_of"),
    ("use_beam_search", True, "use_beam_search"),
    ("chat_template", "x", "chat_template"),
    ("echo", True, "echo"),
]  # fmt: skip


async def test_what_nests_too_deeply_is_named_by_its_path():
    schema = {"type": "string"}
    for _ in range(200):
        schema = {"type": "array", "items": schema}
    shape = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = await post(CHAT, chat_body(response_format=shape))
    assert_openai_error(response, 400, "response_format.json_schema.schema.items")


@pytest.mark.parametrize(("field", "value", "param"), WRONG_CHAT_FIELDS)
async def test_each_wrong_chat_field_is_a_400_that_names_it(field, value, param):
    service = FakeGeneration()
    content = json.dumps(chat_body(**{field: value})).replace("Infinity", "1e400")
    async with client_for(make_context(service)) as client:
        assert_openai_error(await client.post(CHAT, content=content), 400, param)
    assert not service.requests


@pytest.mark.parametrize("body", [{}, {"model": "default"}])
async def test_a_missing_required_field_is_named(body):
    assert assert_openai_error(await post(CHAT, body), 400, "messages")["code"] == "missing_required_parameter"
    assert assert_openai_error(await post(COMPLETIONS, body), 400, "prompt")["code"] == "missing_required_parameter"
    assert_openai_error(await post("/detokenize", body), 400, "tokens")
    assert_openai_error(await post("/tokenize", body), 400, "prompt")


async def test_two_ways_to_shape_an_answer_exclude_each_other():
    error = assert_openai_error(await post(CHAT, chat_body(guided_regex="a", guided_choice=["b"])), 400)
    assert "guided_choice" in error["message"] and "guided_regex" in error["message"]


async def test_two_different_token_limits_are_refused():
    assert_openai_error(
        await post(CHAT, chat_body(max_tokens=5, max_completion_tokens=6)), 400, "max_completion_tokens"
    )


async def test_fields_nobody_knows_and_hints_without_effect_are_tolerated():
    body = chat_body(
        user="me", metadata={"a": "b"}, prompt_cache_key="k", safety_identifier="s", store=False, service_tier="auto",
        tool_choice="none", verbosity="medium", modalities=["text"], something_new={"deep": [1]}, logit_bias=None,
        temperature=None, stop=None, tools=None, response_format=None, stream_options=None, max_tokens=None,
    )  # fmt: skip
    assert (await post(CHAT, body)).status_code == 200


async def test_an_over_long_prompt_says_both_counts():
    error = ContextLengthExceeded(num_prompt_tokens=5000, max_tokens=10, context_tokens=4096)
    async with client_for(make_context(FakeGeneration(refusal=error))) as client:
        body = assert_openai_error(await client.post(CHAT, json=chat_body()), 400)
    assert body["code"] == "context_length_exceeded"
    assert "4096" in body["message"] and "5010" in body["message"] and "5000" in body["message"]


async def test_a_body_of_ten_megabytes_is_read_and_answered():
    messages = [{"role": "user", "content": "x" * 10_000_000}]
    assert (await post(CHAT, chat_body(messages=messages))).status_code == 200


NUMBERS = st.integers(-5, 5) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def fitting(schema: dict[str, Any], definitions: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a JSON schema allows, as far as these schemas go."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[-1]
        return st.deferred(lambda: fitting(definitions[name], definitions))
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return st.one_of([fitting(option, definitions) for option in schema[key]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    match schema.get("type"):
        case "null":
            return st.none()
        case "boolean":
            return st.booleans()
        case "integer":
            return st.integers(schema.get("minimum", -9), min(schema.get("maximum", 9), 9))
        case "number":
            low = schema.get("minimum", schema.get("exclusiveMinimum", -9))
            return st.floats(low, min(schema.get("maximum", 9), 9), exclude_min="exclusiveMinimum" in schema)
        case "string":
            return st.text(min_size=schema.get("minLength", 0), max_size=6)
        case "array":
            items = fitting(schema.get("items", {}), definitions)
            return st.lists(items, min_size=schema.get("minItems", 0), max_size=3)
        case "object" if "properties" in schema:
            parts = {name: fitting(part, definitions) for name, part in schema["properties"].items()}
            required = {name: parts.pop(name) for name in schema.get("required", ())}
            return st.fixed_dictionaries(required, optional=parts)
        case "object":
            return st.dictionaries(st.text(max_size=5), JSON, max_size=3)
    return JSON


def bodies(wire: type[BaseModel], required: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A good request with up to three fields set: to what their schemas allow, or to anything."""
    schema = wire.model_json_schema()
    names = st.lists(st.sampled_from(sorted(schema["properties"])), max_size=3, unique=True)

    def fill(chosen: list[str]) -> st.SearchStrategy[dict[str, Any]]:
        parts = {name: fitting(schema["properties"][name], schema.get("$defs", {})) for name in chosen}
        return st.fixed_dictionaries({name: part | part | JSON for name, part in parts.items()})

    return names.flatmap(fill).map(lambda fields: {**required, **fields})


FUZZ = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(body=bodies(ChatCompletionRequest, chat_body()))
async def test_no_chat_body_whatsoever_is_a_500(body):
    response = await post(CHAT, body)
    assert response.status_code < 500, (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@FUZZ
@given(body=bodies(CompletionRequest, {"prompt": "x"}))
async def test_no_completion_body_whatsoever_is_a_500(body):
    response = await post(COMPLETIONS, body)
    assert response.status_code < 500, (body, response.text)


@FUZZ
@given(content=st.binary(max_size=40))
async def test_no_bytes_whatsoever_are_a_500(content):
    async with client_for(make_context()) as client:
        assert_openai_error(await client.post(CHAT, content=content), 400)
