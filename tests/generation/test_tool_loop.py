"""Chat with tools that the server calls: one answer out of several generations, whatever the model and the tools do."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.api.fakes import (
    FakeGeneration,
    calls,
    chat_body,
    client_for,
    make_context,
    says,
    sse_payloads,
    thinks,
    until,
)
from vllm_mlx.errors import DeadlineExceeded
from vllm_mlx.generation import tool_loop
from vllm_mlx.generation.events import Finished, KeepAlive, Message, collect
from vllm_mlx.generation.request import ChatMessage, GenerationRequest, TextPart, Tool, ToolChoice
from vllm_mlx.generation.tool_loop import ToolLoop
from vllm_mlx.parsers.events import TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted
from vllm_mlx.settings import Settings


@dataclass
class FakeTool:
    full_name: str
    description: str = ""
    parameters: dict = field(default_factory=lambda: {"type": "object"})
    server: str = "s"


@dataclass
class FakeResult:
    text: str
    is_error: bool = False


@dataclass
class FakeTools:
    """`do` answers a call; names are s__look and s__write."""

    do: Callable[[str, dict], Any] = lambda name, arguments: f"seen {arguments}"
    called: list[tuple[str, dict]] = field(default_factory=list)
    connections: Sequence[Any] = ()

    def tools(self) -> list[FakeTool]:
        return [FakeTool("s__look", "Look."), FakeTool("s__write")]

    async def call(self, full_name: str, arguments: dict) -> FakeResult:
        self.called.append((full_name, arguments))
        result = self.do(full_name, arguments)
        if asyncio.iscoroutine(result):
            result = await result
        return result if isinstance(result, FakeResult) else FakeResult(str(result))


def scripted(*steps: Sequence[Any]) -> FakeGeneration:
    """A model that says these one after the other."""
    left = list(steps)
    return FakeGeneration(lambda request: left.pop(0))


def loop_over(service: FakeGeneration, tools: FakeTools, **options) -> ToolLoop:
    return ToolLoop(service, tools, max_steps=options.pop("max_steps", 3), timeout_s=options.pop("timeout_s", 30.0))


ASK = GenerationRequest("r", messages=(ChatMessage("user", (TextPart("Hi"),)),))
OWN = Tool("own_tool", "The client's.")


async def answer(loop: ToolLoop, request: GenerationRequest = ASK) -> Message:
    return await collect(loop.generate(request))


async def test_the_reader_sees_one_answer_and_the_model_the_tools_results():
    service = scripted(
        [TextDelta("Let me look."), *calls("s__look", '{"at": ', '"it"}')], [*thinks("hm", "There it is.")]
    )
    tools = FakeTools()
    message = await answer(loop_over(service, tools))
    assert message.text == "Let me look.\n\nThere it is." and message.tool_calls == []
    assert tools.called == [("s__look", {"at": "it"})]
    assert message.finished.reason == "stop" and message.finished.usage.num_completion_tokens == 14
    (call,) = message.finished.diagnostics["mcp"]["calls"]
    assert call["tool"] == "s__look" and not call["is_error"]
    first, second = service.requests
    assert [tool.name for tool in first.tools] == ["s__look", "s__write"] and first.id == second.id == "r"
    turn, result = second.messages[1:]
    assert turn.role == "assistant" and turn.text == "Let me look." and turn.tool_calls[0].name == "s__look"
    assert result.role == "tool" and result.text == "seen {'at': 'it'}"
    assert result.tool_call_id == turn.tool_calls[0].id and len(result.tool_call_id) == 9


async def test_several_calls_of_a_step_are_made_together_and_answered_in_order():
    both = asyncio.Barrier(2)

    async def do(name: str, arguments: dict) -> str:
        await both.wait()  # neither returns before the other is called
        return name

    step = [
        ToolCallStarted(0, "s__look"), ToolCallDelta(0, "{}"), ToolCallEnded(0),
        ToolCallStarted(1, "s__write"), ToolCallDelta(1, "{}"), ToolCallEnded(1),
        Finished("tool_calls", says("")[-1].usage),
    ]  # fmt: skip
    service = scripted(step, says("done"))
    assert (await answer(loop_over(service, FakeTools(do)))).text == "done"
    assert [m.text for m in service.requests[1].messages if m.role == "tool"] == ["s__look", "s__write"]


async def test_a_call_of_the_clients_tool_ends_the_answer_and_ours_beside_it_are_not_made():
    step = [
        ToolCallStarted(0, "s__look"), ToolCallDelta(0, "{}"), ToolCallEnded(0),
        ToolCallStarted(1, "own_tool", "id1"), ToolCallDelta(1, '{"a": 1}'), ToolCallEnded(1),
        Finished("tool_calls", says("")[-1].usage),
    ]  # fmt: skip
    tools = FakeTools()
    request = GenerationRequest("r", messages=ASK.messages, tools=(OWN,))
    message = await answer(loop_over(scripted(step), tools), request)
    (call,) = message.tool_calls
    assert (call.name, call.arguments, call.id) == ("own_tool", '{"a": 1}', "id1")
    assert message.finished.reason == "tool_calls" and tools.called == []


async def test_a_client_tool_of_our_name_stays_the_clients():
    tools = FakeTools()
    request = GenerationRequest("r", messages=ASK.messages, tools=(Tool("s__look"),))
    message = await answer(loop_over(scripted(calls("s__look", "{}")), tools), request)
    assert [call.name for call in message.tool_calls] == ["s__look"] and tools.called == []


async def test_a_model_that_leaves_the_servers_name_out_means_our_tool_unless_the_client_has_one():
    tools = FakeTools()
    service = scripted(calls("look", "{}"), says("done"))
    assert (await answer(loop_over(service, tools))).text == "done"
    assert tools.called == [("s__look", {})]
    assert service.requests[1].messages[1].tool_calls[0].name == "s__look"
    tools = FakeTools()
    request = GenerationRequest("r", messages=ASK.messages, tools=(Tool("look"),))
    message = await answer(loop_over(scripted(calls("look", "{}")), tools), request)
    assert [call.name for call in message.tool_calls] == ["look"] and tools.called == []


@pytest.mark.parametrize(
    "request_",
    [
        GenerationRequest("r", prompt="text"),
        GenerationRequest("r", messages=ASK.messages, tool_choice=ToolChoice("none")),
        GenerationRequest("r", messages=ASK.messages, tools=(OWN,), tool_choice=ToolChoice("required")),
        GenerationRequest("r", messages=ASK.messages, tools=(OWN,), tool_choice=ToolChoice("named", "own_tool")),
    ],
    ids=["completion", "none", "required", "named"],
)
async def test_a_request_that_leaves_no_choice_is_passed_on_as_it_is(request_):
    service = scripted(says("plain"))
    assert (await answer(loop_over(service, FakeTools()), request_)).text == "plain"
    assert service.requests == [request_]


async def test_what_goes_wrong_is_told_to_the_model():
    def do(name: str, arguments: dict) -> Any:
        if name == "s__look":
            raise DeadlineExceeded("it took longer than 1 s.")
        return FakeResult("no such file", is_error=True)

    broken = [ToolCallStarted(0, "s__look"), ToolCallDelta(0, '{"a": 1'), ToolCallEnded(0, is_complete=False),
              Finished("tool_calls", says("")[-1].usage)]  # fmt: skip
    service = scripted(
        calls("s__look", "{}"),
        calls("s__write", "{}"),
        calls("s__look", "[1]"),
        calls("s__look", "{x"),
        broken,
        says("ok"),
    )
    tools = FakeTools(do)
    message = await answer(loop_over(service, tools, max_steps=9))
    told = [m.text for m in service.requests[-1].messages if m.role == "tool"]
    assert told[:2] == ["Error: it took longer than 1 s.", "Error: no such file"]
    assert ["not a whole JSON object" in told[2], "not valid JSON" in told[3], "JSON" in told[4]] == [True] * 3
    assert message.text == "ok" and len(tools.called) == 2
    assert all(call["is_error"] for call in message.finished.diagnostics["mcp"]["calls"])


async def test_after_so_many_steps_the_model_answers_without_tools():
    service = scripted(*[calls("s__look", "{}")] * 3, says("enough"))
    tools = FakeTools()
    message = await answer(loop_over(service, tools, max_steps=3))
    assert len(tools.called) == 3 and message.text == "enough" and message.finished.reason == "stop"
    assert [r.tool_choice.mode for r in service.requests] == ["auto"] * 3 + ["none"]


async def test_the_token_limit_is_of_the_whole_answer():
    service = scripted(calls("s__look", "{}"), says("short"))
    request = GenerationRequest("r", messages=ASK.messages, max_tokens=10)
    assert (await answer(loop_over(service, FakeTools()), request)).text == "short"
    assert service.requests[1].max_tokens == 3  # a step of the fake takes 7
    tools = FakeTools()
    request = GenerationRequest("r", messages=ASK.messages, max_tokens=7)
    message = await answer(loop_over(scripted(calls("s__look", "{}")), tools), request)
    assert message.finished.reason == "length" and tools.called == []


async def test_a_slow_tool_keeps_the_stream_alive_and_ends_with_the_requests_time(monkeypatch):
    monkeypatch.setattr(tool_loop, "KEEP_ALIVE_S", 0.01)
    hold = asyncio.Event()
    tools = FakeTools(lambda name, arguments: hold.wait())
    alive = 0
    events = loop_over(scripted(calls("s__look", "{}"), says("late")), tools).generate(ASK)
    async for event in events:
        if isinstance(event, KeepAlive):
            alive += 1
            if alive == 3:
                hold.set()
    assert alive >= 3
    never = FakeTools(lambda name, arguments: asyncio.Event().wait())
    message = await answer(loop_over(scripted(calls("s__look", "{}")), never, timeout_s=0.05))
    assert message.finished.reason == "deadline"


async def test_cancelling_while_a_tool_runs_ends_the_answer():
    tools = FakeTools(lambda name, arguments: asyncio.Event().wait())
    loop = loop_over(scripted(calls("s__look", "{}")), tools)
    asking = asyncio.create_task(answer(loop))
    await until(lambda: bool(tools.called))
    assert loop.cancel("r") and not loop.cancel("unknown")
    assert (await asking).finished.reason == "cancelled"
    assert not loop.cancel("r")


async def test_leaving_early_ends_the_step_and_the_calls():
    ended = asyncio.Event()

    async def do(name: str, arguments: dict) -> str:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return ""

    tools = FakeTools(do)
    asking = asyncio.create_task(answer(loop_over(scripted(calls("s__look", "{}")), tools)))
    await until(lambda: bool(tools.called))
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)
    await asyncio.wait_for(ended.wait(), 10)


async def test_over_http_it_is_on_when_the_operator_says_so():
    for is_on in (True, False):
        tools = FakeTools()
        service = scripted(calls("s__look", "{}"), says("seen"))
        settings = Settings().with_values(mcp__mcp_in_chat=is_on, mcp__mcp_config="x")
        async with client_for(make_context(service, mcp=tools, settings=settings)) as client:
            answered = (await client.post("/v1/chat/completions", json=chat_body(include_diagnostics=True))).json()
            assert len(tools.called) == int(is_on)
            if is_on:
                assert answered["choices"][0]["message"]["content"] == "seen"
                assert answered["choices"][0]["finish_reason"] == "stop"
                assert answered["diagnostics"]["mcp"]["calls"][0]["tool"] == "s__look"
            else:
                assert answered["choices"][0]["finish_reason"] == "tool_calls"
            features = (await client.get("/v1/capabilities")).json()["features"]
            assert features["mcp"] and features["mcp_in_chat"] is is_on


async def test_a_stream_over_http_shows_text_only():
    service = scripted([TextDelta("Looking."), *calls("s__look", "{}")], says("Seen."))
    settings = Settings().with_values(mcp__mcp_in_chat=True, mcp__mcp_config="x")
    async with client_for(make_context(service, mcp=FakeTools(), settings=settings)) as client:
        chunks = sse_payloads((await client.post("/v1/chat/completions", json=chat_body(stream=True))).text)
        service.script = lambda request: says("Anthropic")
        body = {"model": "x", "max_tokens": 9, "messages": [{"role": "user", "content": "Hi"}]}
        message = (await client.post("/v1/messages", json=body)).json()
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Looking.\n\nSeen."
    assert not any("tool_calls" in delta for delta in deltas)
    assert message["content"][0]["text"] == "Anthropic" and [t.name for t in service.requests[-1].tools]


async def test_responses_have_the_tools_too():
    service = scripted([TextDelta("Looking."), *calls("s__look", "{}")], says("Seen."))
    tools = FakeTools()
    settings = Settings().with_values(mcp__mcp_in_chat=True, mcp__mcp_config="x")
    async with client_for(make_context(service, mcp=tools, settings=settings)) as client:
        answered = (await client.post("/v1/responses", json={"model": "x", "input": "Hi"})).json()
    (item,) = [item for item in answered["output"] if item["type"] == "message"]
    assert item["content"][0]["text"] == "Looking.\n\nSeen." and tools.called
    assert not [item for item in answered["output"] if item["type"] == "function_call"]
