"""Claims about POST /v1/chat/completions, against a scripted generation service."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.api.fakes import (
    MODEL_ID,
    FakeGeneration,
    calls,
    chat_body,
    client_for,
    finished,
    logprobs,
    make_context,
    says,
    sse_payloads,
    thinks,
)
from vllm_mlx.errors import ContextLengthExceeded, DeadlineExceeded, EngineError, Overloaded, Unavailable
from vllm_mlx.generation.events import KeepAlive, ParserNote
from vllm_mlx.generation.request import MediaPart, TextPart
from vllm_mlx.parsers.events import TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted
from vllm_mlx.settings import Settings

CHAT = "/v1/chat/completions"


async def ask(service: FakeGeneration, body: dict, **context):
    async with client_for(make_context(service, **context)) as client:
        return await client.post(CHAT, json=body)


async def test_a_whole_answer_has_openais_shape():
    answer = (await ask(FakeGeneration(), chat_body())).json()
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["model"] == MODEL_ID
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello world", "refusal": None}
    assert choice["finish_reason"] == "stop" and choice["logprobs"] is None
    assert answer["usage"] == {
        "prompt_tokens": 11,
        "completion_tokens": 7,
        "total_tokens": 18,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


async def test_a_stream_says_the_same_as_the_whole_answer():
    service = FakeGeneration(lambda r: thinks("hmm", "yes"))
    whole = (await ask(service, chat_body())).json()["choices"][0]["message"]
    response = await ask(service, chat_body(stream=True))
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = sse_payloads(response.text)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert "".join(d.get("content", "") for d in deltas) == whole["content"] == "yes"
    assert "".join(d.get("reasoning_content", "") for d in deltas) == whole["reasoning_content"] == "hmm"
    assert "".join(d.get("reasoning", "") for d in deltas) == whole["reasoning"] == "hmm"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, "stop"]
    assert len({c["id"] for c in chunks}) == 1 and all(c["object"] == "chat.completion.chunk" for c in chunks)
    assert all("usage" not in c for c in chunks)


async def test_usage_is_the_last_chunk_when_asked_for_and_null_in_the_others():
    response = await ask(FakeGeneration(), chat_body(stream=True, stream_options={"include_usage": True}))
    *others, last = sse_payloads(response.text)
    assert last["choices"] == [] and last["usage"]["completion_tokens"] == 7
    assert all(chunk["usage"] is None for chunk in others)


async def test_tool_calls_are_streamed_with_index_id_and_name_then_arguments():
    service = FakeGeneration(lambda r: calls("get_weather", '{"city":', ' "Oslo"}'))
    whole = (await ask(service, chat_body())).json()["choices"][0]
    (call,) = whole["message"]["tool_calls"]
    assert whole["finish_reason"] == "tool_calls" and whole["message"]["content"] is None
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"] == {"name": "get_weather", "arguments": '{"city": "Oslo"}'}

    chunks = sse_payloads((await ask(service, chat_body(stream=True))).text)
    pieces = [c["choices"][0]["delta"]["tool_calls"][0] for c in chunks if "tool_calls" in c["choices"][0]["delta"]]
    assert pieces[0]["index"] == 0 and pieces[0]["id"].startswith("call_")
    assert pieces[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert [p["function"] for p in pieces[1:]] == [{"arguments": '{"city":'}, {"arguments": ' "Oslo"}'}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_two_tool_calls_keep_their_indices():
    events = [
        ToolCallStarted(0, "a", "call_x"), ToolCallDelta(0, "{}"), ToolCallEnded(0),
        ToolCallStarted(1, "b"), ToolCallDelta(1, "{}"), ToolCallEnded(1), finished("tool_calls"),
    ]  # fmt: skip
    service = FakeGeneration(lambda r: events)
    message = (await ask(service, chat_body())).json()["choices"][0]["message"]
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["a", "b"]
    assert message["tool_calls"][0]["id"] == "call_x"
    chunks = sse_payloads((await ask(service, chat_body(stream=True))).text)
    indices = [t["index"] for c in chunks for t in c["choices"][0]["delta"].get("tool_calls", [])]
    assert indices == [0, 0, 1, 1]


async def test_n_choices_run_concurrently_with_seeds_of_their_own():
    barrier = asyncio.Barrier(3)
    service = FakeGeneration(lambda r: [barrier.wait, *says(f"seed {r.sampling.seed}")])
    answer = (await asyncio.wait_for(ask(service, chat_body(n=3, seed=5)), 5)).json()
    assert [c["message"]["content"] for c in answer["choices"]] == ["seed 5", "seed 6", "seed 7"]
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == 11 and answer["usage"]["completion_tokens"] == 21
    assert len({r.id for r in service.requests}) == 3


async def test_n_choices_stream_with_their_index_and_one_end():
    service = FakeGeneration(lambda r: says(f"choice {r.sampling.seed}"))
    response = await ask(service, chat_body(n=2, seed=0, stream=True, stream_options={"include_usage": True}))
    chunks = sse_payloads(response.text)
    texts = {0: "", 1: ""}
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
    assert texts == {0: "choice 0", 1: "choice 1"}
    assert chunks[-1]["usage"]["completion_tokens"] == 14
    assert response.text.count("[DONE]") == 1


async def test_one_failing_choice_fails_the_request_before_the_headers_and_ends_the_others():
    def script(request):
        return [EngineError("boom")] if request.sampling.seed == 1 else [asyncio.Event().wait, *says("x")]

    service = FakeGeneration(script)
    response = await asyncio.wait_for(ask(service, chat_body(n=2, seed=0)), 5)
    assert response.status_code == 500 and response.json()["error"]["message"] == "boom"
    assert not service.running


async def test_logprobs_have_the_chat_shape_in_both_forms():
    service = FakeGeneration(lambda r: [logprobs("Hel", "lo"), *says("Hello")])
    body = chat_body(logprobs=True, top_logprobs=2)
    content = (await ask(service, body)).json()["choices"][0]["logprobs"]["content"]
    assert [c["token"] for c in content] == ["Hel", "lo"]
    assert content[0]["bytes"] == [72, 101, 108] and len(content[0]["top_logprobs"]) == 2
    assert service.requests[0].sampling.num_logprobs == 2
    chunks = sse_payloads((await ask(service, {**body, "stream": True})).text)
    streamed = [e for c in chunks if c["choices"][0]["logprobs"] for e in c["choices"][0]["logprobs"]["content"]]
    assert streamed == content


async def test_a_matched_stop_string_is_named():
    service = FakeGeneration(lambda r: says("x", end=finished(stop_sequence="END")))
    assert (await ask(service, chat_body(stop="END"))).json()["choices"][0]["stop_reason"] == "END"
    assert service.requests[0].stop == ("END",)
    assert (
        sse_payloads((await ask(service, chat_body(stop=["END", "X"], stream=True))).text)[-1]["choices"][0][
            "stop_reason"
        ]
        == "END"
    )


async def test_repetition_is_told_as_the_guide_says():
    service = FakeGeneration(lambda r: says("x", end=finished("repetition", detail="single_token_run")))
    choice = (await ask(service, chat_body())).json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "repetition_detected" and choice["stop_reason_detail"] == "single_token_run"


async def test_a_document_or_call_that_was_cut_does_not_pass_for_a_whole_one():
    for reason in ("repetition", "length"):
        service = FakeGeneration(lambda r, reason=reason: says("x", end=finished(reason, is_cut=True)))
        assert (await ask(service, chat_body())).json()["choices"][0]["finish_reason"] == "length"
        last = sse_payloads((await ask(service, chat_body(stream=True))).text)[-1]
        assert last["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(("effort", "enabled"), [("none", False), ("low", True), ("high", True), (None, None)])
async def test_an_effort_says_whether_there_is_reasoning(effort, enabled):
    service = FakeGeneration()
    await ask(service, chat_body(reasoning_effort=effort))
    await ask(service, chat_body(reasoning_effort=effort, enable_thinking=False))
    assert [r.reasoning.enabled for r in service.requests] == [enabled, False]


async def test_every_field_reaches_the_generation_request():
    service = FakeGeneration()
    body = chat_body(
        messages=[
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [
                {"type": "text", "text": "What is"},
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}}]},
            {"role": "assistant", "content": None, "reasoning_content": "let me see", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "42"},
        ],
        temperature=0.5, top_p=0, top_k=-1, min_p=0.1, seed=-1, presence_penalty=0.5, frequency_penalty=-0.5,
        repetition_penalty=1.1, logit_bias={"5": -100}, max_completion_tokens=9, stop_token_ids=[7], min_tokens=2,
        ignore_eos=True, timeout=3.5, priority=2, parallel_tool_calls=False, reasoning_effort="high",
        max_thinking_tokens=64, enable_thinking=True, chat_template_kwargs={"x": 1}, cache_salt="salt",
        include_stop_str_in_output=True, skip_special_tokens=False, repetition_policy_override="safe",
        tools=[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}],
        tool_choice={"type": "function", "function": {"name": "f"}},
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
    )  # fmt: skip
    assert (await ask(service, body)).status_code == 200
    (request,) = service.requests
    system, user, assistant, tool = request.messages
    assert system.role == "system" and system.parts == (TextPart("Be brief"),)
    assert user.parts[1] == MediaPart(
        "image", "data:image/png;base64,AA", "messages.1.content.1.image_url", {"detail": "low"}
    )
    assert assistant.reasoning == "let me see" and json.loads(assistant.tool_calls[0].arguments) == {"a": 1}
    assert tool.tool_call_id == "c1" and tool.text == "42"
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 0, 0.1, 2**63 - 1)
    assert 0 < sampling.top_p < 1e-3
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -0.5, 1.1)
    assert sampling.logit_bias == {5: -100} and sampling.min_tokens == 2 and sampling.ignore_eos
    assert request.max_tokens == 9 and request.stop_token_ids == (7,) and request.timeout_s == 3.5
    assert request.priority == 2 and not request.parallel_tool_calls and request.include_stop
    assert not request.skip_special_tokens and request.repetition_policy == "safe" and request.namespace == "salt"
    assert request.reasoning.enabled and request.reasoning.effort == "high" and request.reasoning.max_tokens == 64
    assert request.template_kwargs == {"x": 1}
    assert request.tool_choice.mode == "named" and request.tool_choice.name == "f" and request.tools[0].strict
    assert request.output_format.kind == "json_schema" and request.output_format.value == {"type": "object"}


@pytest.mark.parametrize(
    ("fields", "kind", "value"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object", None),
        ({"guided_json": '{"type": "object"}'}, "json_schema", {"type": "object"}),
        ({"guided_regex": "a+"}, "regex", "a+"),
        ({"guided_choice": ["a", "b"]}, "choice", ("a", "b")),
        ({"guided_grammar": 'root ::= "a"'}, "gbnf", 'root ::= "a"'),
        ({"guided_grammar": 'start: "a"'}, "lark", 'start: "a"'),
        ({"structured_outputs": {"json": {"type": "object"}}}, "json_schema", {"type": "object"}),
        ({"structured_outputs": {"choice": ["x"]}}, "choice", ("x",)),
    ],
)
async def test_each_way_to_ask_for_a_shape_is_understood(fields, kind, value):
    service = FakeGeneration()
    assert (await ask(service, chat_body(**fields))).status_code == 200
    assert (service.requests[0].output_format.kind, service.requests[0].output_format.value) == (kind, value)


async def test_text_format_asks_for_no_shape():
    service = FakeGeneration()
    await ask(service, chat_body(response_format={"type": "text"}))
    assert service.requests[0].output_format is None


async def test_keep_alives_are_comments_that_clients_skip():
    service = FakeGeneration(
        lambda r: [KeepAlive("waiting", 9, 0, 2, 3.2), KeepAlive("prefill", 9, 4), ParserNote("x"), *says("a")]
    )
    response = await ask(service, chat_body(stream=True))
    comments = ": keep-alive waiting, 2 ahead, about 3 s\n\n: keep-alive prefill, 4 of 9 tokens\n\n"
    assert response.text.startswith(comments + "data: ")
    assert len(sse_payloads(response.text)) == 3


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (Overloaded("full", retry_after_s=2.4), 429, "overloaded", "3"),
        (Unavailable("no memory", retry_after_s=5), 503, "unavailable", "5"),
        (DeadlineExceeded("too slow"), 504, "timeout", None),
        (EngineError("broken"), 500, "engine_error", None),
        (
            ContextLengthExceeded(num_prompt_tokens=9, max_tokens=1, context_tokens=5),
            400,
            "context_length_exceeded",
            None,
        ),
    ],
)
async def test_errors_before_the_first_event_have_a_status_streaming_or_not(stream, error, status, code, retry):
    response = await ask(FakeGeneration(refusal=error), chat_body(stream=stream))
    assert response.status_code == status
    body = response.json()["error"]
    assert body["message"] == str(error) and body["code"] == code and set(body) == {"message", "type", "param", "code"}
    assert response.headers.get("retry-after") == retry


async def test_an_error_after_the_headers_is_an_event_and_then_done():
    for ending in (EngineError("broken"), finished("error", error="broken")):
        service = FakeGeneration(lambda r, e=ending: [TextDelta("a"), e])
        response = await ask(service, chat_body(stream=True))
        assert response.status_code == 200
        assert sse_payloads(response.text)[-1]["error"]["message"] == "broken"
        whole = await ask(service, chat_body())
        assert whole.status_code == 500 and whole.json()["error"]["message"] == "broken"


async def test_a_deadline_is_504_whole_and_an_error_event_streamed():
    service = FakeGeneration(lambda r: [TextDelta("a"), finished("deadline", detail="timed out after 1 s")])
    assert (await ask(service, chat_body())).status_code == 504
    last = sse_payloads((await ask(service, chat_body(stream=True))).text)[-1]
    assert last["error"]["code"] == "timeout" and "1 s" in last["error"]["message"]


async def test_a_defect_answers_500_without_telling_the_inside():
    response = await ask(FakeGeneration(refusal=RuntimeError("secret path")), chat_body())
    assert response.status_code == 500 and "secret" not in response.text
    assert response.json()["error"]["type"] == "server_error"


async def test_diagnostics_come_when_asked_for_at_the_level_asked_for():
    end = finished(diagnostics={"queue_s": 0.1, "runtime": {"memory": 1}})
    service = FakeGeneration(lambda r: says("a", end=end))
    assert "diagnostics" not in (await ask(service, chat_body())).json()
    basic = (await ask(service, chat_body(include_diagnostics=True))).json()["diagnostics"]
    assert basic == {"level": "basic", "queue_s": 0.1}
    deep = (await ask(service, chat_body(diagnostics_level="deep"))).json()["diagnostics"]
    assert deep["runtime"] == {"memory": 1}
    streamed = sse_payloads((await ask(service, chat_body(diagnostics_level="deep", stream=True))).text)
    assert streamed[-1]["diagnostics"] == deep


async def test_any_model_name_is_served_unless_the_server_is_strict():
    service = FakeGeneration()
    for name in ("default", "gpt-4o", None):
        assert (await ask(service, chat_body(model=name))).json()["model"] == MODEL_ID
    strict = Settings().with_values(server__strict_model_id=True, server__model_alias=("haiku=default",))
    for name, status in ((MODEL_ID, 200), ("haiku", 200), ("default", 404), ("gpt-4o", 404), (None, 404)):
        response = await ask(service, chat_body(model=name), settings=strict)
        assert response.status_code == status
        if status == 404:
            error = response.json()["error"]
            assert error["code"] == "model_not_found" and error["param"] == "model" and MODEL_ID in error["message"]


async def test_media_may_stand_in_every_turn_but_the_assistants_and_be_written_in_either_way():
    service = FakeGeneration()
    image = {"type": "image", "image": "https://x/a.png"}
    messages = [
        {"role": "system", "content": [{"type": "image_url", "image_url": "https://x/a.png"}]},
        {"role": "user", "content": [image, {"type": "video", "video": {"url": "https://x/a.gif"}}]},
    ]
    await ask(service, chat_body(messages=messages, video_fps=1))
    parts = [part for message in service.requests[0].messages for part in message.parts]
    assert [(p.kind, p.source, p.param) for p in parts] == [
        ("image", "https://x/a.png", "messages.0.content.0.image_url"),
        ("image", "https://x/a.png", "messages.1.content.0.image"),
        ("video", "https://x/a.gif", "messages.1.content.1.video"),
    ]
    assert parts[2].options == {"fps": 1}
    refused = await ask(service, chat_body(messages=[*messages, {"role": "assistant", "content": [image]}]))
    assert refused.status_code == 400 and "assistant" in refused.json()["error"]["message"]


async def test_a_repetition_override_needs_trust():
    body = chat_body(repetition_policy_override="strict")
    public = Settings().with_values(server__host="0.0.0.0")
    assert (await ask(FakeGeneration(), body, settings=public)).status_code == 403
    trusting = public.with_values(server__trust_requests_when_auth_disabled=True)
    assert (await ask(FakeGeneration(), body, settings=trusting)).status_code == 200
    assert (await ask(FakeGeneration(), body)).status_code == 200  # httpx's transport calls from 127.0.0.1
