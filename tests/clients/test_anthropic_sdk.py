"""The official `anthropic` package against the application behind a real socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anthropic
import pytest

from tests.api.fakes import FakeGeneration, calls, finished, live_server, make_context, says, thinks, until
from vllm_mlx.errors import EngineError, Overloaded
from vllm_mlx.parsers.events import TextDelta

HI = [{"role": "user", "content": "Hi"}]
TOOL = {"name": "get", "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}}}


@asynccontextmanager
async def sdk(service: FakeGeneration | None = None, **context) -> AsyncIterator[anthropic.AsyncAnthropic]:
    async with live_server(make_context(service or FakeGeneration(), **context)) as address:
        async with anthropic.AsyncAnthropic(base_url=address, api_key="sk", max_retries=0) as client:
            yield client


async def test_a_message_is_typed_and_its_stream_folds_to_the_same():
    async with sdk(FakeGeneration(lambda r: thinks("hmm", "yes"))) as client:
        whole = await client.messages.create(model="default", max_tokens=10, messages=HI)
        async with client.messages.stream(model="default", max_tokens=10, messages=HI) as stream:
            text = [piece async for piece in stream.text_stream]
            streamed = await stream.get_final_message()
    assert [block.type for block in whole.content] == ["thinking", "text"]
    assert whole.content[0].thinking == "hmm" and whole.content[0].signature
    assert streamed.content[0] == whole.content[0] and streamed.content[1].text == whole.content[1].text == "yes"
    assert streamed.usage.output_tokens == whole.usage.output_tokens == 7
    assert whole.usage.cache_read_input_tokens == streamed.usage.cache_read_input_tokens == 4
    assert streamed.usage.input_tokens == whole.usage.input_tokens
    assert "".join(text) == "yes" and whole.stop_reason == streamed.stop_reason == "end_turn"
    assert whole._request_id


async def test_tool_use_round_trips():
    service = FakeGeneration(lambda r: calls("get", '{"city": ', '"Oslo"}') if len(r.messages) == 1 else says("done"))
    async with sdk(service) as client:
        async with client.messages.stream(model="default", max_tokens=10, messages=HI, tools=[TOOL]) as stream:
            first = await stream.get_final_message()
        (use,) = first.content
        assert first.stop_reason == "tool_use" and use.input == {"city": "Oslo"}
        result = {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]}
        second = await client.messages.create(
            model="default",
            max_tokens=10,
            tools=[TOOL],
            messages=[*HI, {"role": "assistant", "content": first.content}, result],
        )
    assert second.content[0].text == "done"
    sent = service.requests[-1].messages
    assert sent[1].tool_calls[0].id == use.id == sent[2].tool_call_id and sent[2].text == "rain"


async def test_thinking_blocks_are_accepted_back_with_their_signature():
    service = FakeGeneration(lambda r: thinks("hmm", "yes"))
    async with sdk(service) as client:
        first = await client.messages.create(model="default", max_tokens=10, messages=HI)
        await client.messages.create(
            model="default", max_tokens=10, messages=[*HI, {"role": "assistant", "content": first.content}, HI[0]]
        )
    assert service.requests[-1].messages[1].reasoning == "hmm"


async def test_tokens_are_counted_and_models_listed():
    async with sdk() as client:
        assert (await client.messages.count_tokens(model="default", messages=HI)).input_tokens == 3
        models = await client.models.list()
        assert models.data[1].id == "default" and models.data[0].type == "model"


async def test_errors_are_the_packages_own_classes():
    async with sdk(FakeGeneration(refusal=Overloaded("full"))) as client:
        with pytest.raises(anthropic.RateLimitError, match="full"):
            await client.messages.create(model="default", max_tokens=10, messages=HI)
    async with sdk() as client:
        with pytest.raises(anthropic.BadRequestError, match="temperature"):
            await client.messages.create(model="default", max_tokens=10, messages=HI, extra_body={"temperature": -1})
    async with sdk(api_keys={"a": "other"}) as client:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model="default", max_tokens=10, messages=HI)
    async with sdk(FakeGeneration(lambda r: [TextDelta("a"), EngineError("broken")])) as client:
        with pytest.raises(anthropic.APIStatusError, match="broken"):
            async with client.messages.stream(model="default", max_tokens=10, messages=HI) as stream:
                await stream.get_final_message()


async def test_closing_the_stream_ends_the_generation():
    service = FakeGeneration(lambda r: [TextDelta("a"), asyncio.Event().wait, finished()])
    async with sdk(service) as client:
        async with client.messages.stream(model="default", max_tokens=10, messages=HI) as stream:
            await anext(aiter(stream.text_stream))
        await until(lambda: bool(service.closed))
