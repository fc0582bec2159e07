"""The official `openai` package against the application behind a real socket: what it parses is what we meant."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import openai
import pytest
from pydantic import BaseModel

from tests.api.fakes import (
    MODEL_ID,
    FakeGeneration,
    calls,
    finished,
    live_server,
    logprobs,
    make_context,
    says,
    thinks,
    until,
)
from vllm_mlx.errors import ContextLengthExceeded, EngineError, Overloaded
from vllm_mlx.parsers.events import TextDelta
from vllm_mlx.settings import Settings

HI = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}


@asynccontextmanager
async def sdk(service: FakeGeneration | None = None, key: str = "none", **context) -> AsyncIterator[openai.AsyncOpenAI]:
    async with live_server(make_context(service or FakeGeneration(), **context)) as address:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as client:
            yield client


async def test_a_chat_is_a_typed_completion():
    async with sdk(FakeGeneration(lambda r: [logprobs("Hello"), *says("Hello")])) as client:
        completion = await client.chat.completions.create(model="default", messages=HI, logprobs=True, top_logprobs=2)
    assert completion.choices[0].message.content == "Hello" and completion.choices[0].message.role == "assistant"
    assert completion.choices[0].logprobs.content[0].top_logprobs[1].token == "other"
    assert completion.usage.total_tokens == 18 and completion.usage.prompt_tokens_details.cached_tokens == 4
    assert completion.usage.completion_tokens_details.reasoning_tokens == 2


async def test_the_stream_helper_folds_chunks_into_the_same_completion():
    service = FakeGeneration(lambda r: calls("get_weather", '{"city": ', '"Oslo"}'))
    async with sdk(service) as client:
        whole = await client.chat.completions.create(model="default", messages=HI, tools=[WEATHER])
        async with client.chat.completions.stream(model="default", messages=HI, tools=[WEATHER]) as stream:
            async for _ in stream:
                pass
            streamed = await stream.get_final_completion()
    assert whole.choices[0].finish_reason == streamed.choices[0].finish_reason == "tool_calls"
    for completion in (whole, streamed):
        (call,) = completion.choices[0].message.tool_calls
        assert call.function.name == "get_weather" and call.function.arguments == '{"city": "Oslo"}'
        assert call.id.startswith("call_")


async def test_chunks_carry_reasoning_usage_and_one_finish_reason():
    async with sdk(FakeGeneration(lambda r: thinks("hmm", "yes"))) as client:
        stream = await client.chat.completions.create(
            model="default", messages=HI, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "hmm"
    assert "".join(d.content or "" for d in deltas) == "yes"
    assert chunks[-1].usage.completion_tokens == 7
    assert [c.choices[0].finish_reason for c in chunks if c.choices and c.choices[0].finish_reason] == ["stop"]


async def test_parse_returns_the_model_the_schema_came_from():
    class City(BaseModel):
        name: str

    service = FakeGeneration(lambda r: says('{"name": "Oslo"}'))
    async with sdk(service) as client:
        parsed = await client.chat.completions.parse(model="default", messages=HI, response_format=City)
    assert parsed.choices[0].message.parsed == City(name="Oslo")
    assert service.requests[0].output_format.kind == "json_schema" and service.requests[0].output_format.strict


async def test_n_choices_and_completions_are_typed():
    async with sdk(FakeGeneration(lambda r: says(f"{r.sampling.seed}"))) as client:
        chat = await client.chat.completions.create(model="default", messages=HI, n=2, seed=3)
        text = await client.completions.create(model="default", prompt=["a", "b"], seed=3)
        stream = await client.completions.create(model="default", prompt="a", seed=9, stream=True)
        pieces = [chunk.choices[0].text async for chunk in stream]
    assert [c.message.content for c in chat.choices] == ["3", "4"]
    assert [c.text for c in text.choices] == ["3", "3"]
    assert "".join(pieces) == "9"


async def test_models_are_listed_and_retrieved():
    async with sdk() as client:
        listed = [model.id async for model in client.models.list()]
        assert listed == [MODEL_ID, "default"]
        assert (await client.models.retrieve(MODEL_ID)).id == MODEL_ID
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")


async def test_errors_are_the_packages_own_classes_with_message_code_and_param():
    too_long = ContextLengthExceeded(num_prompt_tokens=9, max_tokens=1, context_tokens=5)
    for error, kind, code in (
        (too_long, openai.BadRequestError, "context_length_exceeded"),
        (Overloaded("full"), openai.RateLimitError, "overloaded"),
        (EngineError("broken"), openai.InternalServerError, "engine_error"),
    ):
        async with sdk(FakeGeneration(refusal=error)) as client:
            for stream in (False, True):
                with pytest.raises(kind) as caught:
                    await client.chat.completions.create(model="default", messages=HI, stream=stream)
                assert caught.value.code == code and str(error) in caught.value.message
    async with sdk() as client:
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="default", messages=HI, temperature=-1)
        assert caught.value.param == "temperature"
    async with sdk(key="wrong", api_keys={"a": "right"}) as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with sdk(key="right", api_keys={"a": "right"}) as client:
        assert await client.models.list()
    async with sdk(settings=Settings().with_values(server__strict_model_id=True)) as client:
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="default", messages=HI)


async def test_an_error_in_mid_stream_is_raised_to_the_reader():
    async with sdk(FakeGeneration(lambda r: [TextDelta("a"), EngineError("broken")])) as client:
        stream = await client.chat.completions.create(model="default", messages=HI, stream=True)
        seen = []
        with pytest.raises(openai.APIError, match="broken"):
            async for chunk in stream:
                seen.append(chunk.choices[0].delta.content)
    assert "a" in seen


async def test_closing_the_stream_ends_the_generation():
    service = FakeGeneration(lambda r: [TextDelta("a"), asyncio.Event().wait, finished()])
    async with sdk(service) as client:
        stream = await client.chat.completions.create(model="default", messages=HI, stream=True)
        await anext(aiter(stream))
        await stream.close()
        await until(lambda: bool(service.closed))


def test_the_synchronous_client_works_too():
    async def run() -> None:
        async with live_server(make_context()) as address:
            client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)

            def ask() -> str:
                with client.chat.completions.create(model="default", messages=HI, stream=True) as stream:
                    return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

            assert await asyncio.to_thread(ask) == "Hello world"
            client.close()

    asyncio.run(run())
