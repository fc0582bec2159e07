"""Claims about clients that leave, stall or cancel: over a real socket, streaming or not, the generation ends."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest

from tests.api.fakes import (
    FakeGeneration,
    chat_body,
    client_for,
    finished,
    live_server,
    make_context,
    says,
    sse_payloads,
    until,
)
from vllm_mlx.api import sse
from vllm_mlx.generation.events import KeepAlive
from vllm_mlx.parsers.events import TextDelta

CHAT = "/v1/chat/completions"


def forever(*first):
    """Events, then silence until somebody ends the generation."""
    return lambda request: [*first, asyncio.Event().wait]


async def raw_request(address: str, body: dict) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    writer.write(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (CHAT.encode(), len(content)) + content)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("first", [(), (TextDelta("a"),)])
async def test_a_client_that_leaves_ends_its_generations(stream, n, first):
    service = FakeGeneration(forever(*first))
    context = make_context(service)
    async with live_server(context) as address:
        _, writer = await raw_request(address, chat_body(stream=stream, n=n))
        await until(lambda: len(service.running) == n)
        assert len(context.live) == 1
        writer.close()
        await until(lambda: not service.running)
        await until(lambda: not len(context.live))
        assert len(service.closed) == n


async def test_a_client_that_leaves_while_its_prompt_is_prepared_ends_it():
    started, ended = asyncio.Event(), asyncio.Event()

    class Slow(FakeGeneration):
        async def generate(self, request):
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            yield finished()

    for stream in (False, True):
        started.clear()
        ended.clear()
        async with live_server(make_context(Slow())) as address:
            _, writer = await raw_request(address, chat_body(stream=stream))
            await started.wait()
            writer.close()
            async with asyncio.timeout(10):
                await ended.wait()


async def test_a_connection_serves_the_next_request_after_a_stream():
    async with live_server(make_context()) as address, httpx.AsyncClient() as client:
        for stream in (True, False, True):
            response = await client.post(address + CHAT, json=chat_body(stream=stream))
            assert response.status_code == 200 and "Hello" in response.text


async def test_a_client_that_reads_nothing_is_cancelled_after_the_stall_time(monkeypatch):
    monkeypatch.setattr(sse, "STALL_TIMEOUT_S", 0.2)
    text = "x" * 100_000
    service = FakeGeneration(lambda r: [TextDelta(text)] * 1000)
    async with live_server(make_context(service)) as address:
        _, writer = await raw_request(address, chat_body(stream=True))
        await until(lambda: bool(service.closed))
        writer.close()


async def test_events_reach_the_client_as_they_come():
    proceed = asyncio.Event()
    service = FakeGeneration(lambda r: [KeepAlive("prefill"), proceed.wait, *says("now")])
    async with live_server(make_context(service)) as address, httpx.AsyncClient() as client:
        async with client.stream("POST", address + CHAT, json=chat_body(stream=True)) as response:
            lines = response.aiter_lines()
            assert await anext(lines) == ": keep-alive"
            proceed.set()
            assert "now" in "".join([line async for line in lines])


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by", ["id", "request_id", "generation_id"])
async def test_a_cancelled_request_is_answered_with_what_there_is(stream, by):
    service = FakeGeneration()

    def script(request):
        return [TextDelta("part"), lambda: service.cancel_events[request.id].wait(), finished("cancelled")]

    service.script = script
    context = make_context(service)
    async with client_for(context) as client:
        headers = {"x-request-id": "mine"}
        answer = asyncio.create_task(client.post(CHAT, json=chat_body(stream=stream), headers=headers))
        await until(lambda: bool(service.running))
        (live,) = context.live
        target = {"id": live.id, "request_id": "mine", "generation_id": live.generation_ids[0]}[by]
        cancelled = await client.post(f"/v1/requests/{target}/cancel")
        assert cancelled.status_code == 200 and cancelled.json()["cancelled"] is True
        response = await answer
        assert response.status_code == 200
        if stream:
            choice = sse_payloads(response.text)[-1]["choices"][0]
        else:
            choice = response.json()["choices"][0]
            assert choice["message"]["content"] == "part"
        assert choice["finish_reason"] == "stop" and choice["stop_reason"] == "cancelled"
        missing = await client.post(f"/v1/requests/{target}/cancel")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "request_not_found"


async def test_a_generation_the_server_cancels_is_an_error_and_no_answer():
    service = FakeGeneration(lambda r: [TextDelta("part"), finished("cancelled")])
    async with client_for(make_context(service)) as client:
        assert (await client.post(CHAT, json=chat_body())).status_code == 503
        streamed = await client.post(CHAT, json=chat_body(stream=True))
        assert "shutting down" in sse_payloads(streamed.text)[-1]["error"]["message"]
