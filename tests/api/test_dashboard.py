"""Claims about the dashboard's stream: what it says, who may read it, and that it ends."""

from __future__ import annotations

import json

import httpx

from tests.api.fakes import FakeGeneration, chat_body, client_for, live_server, make_context, until
from vllm_mlx.api import dashboard
from vllm_mlx.api.context import Phase
from vllm_mlx.engine.step import EngineStatus, Progress


async def first(events, number):
    found = []
    async for data in events:
        text = data.decode()
        found.append(json.loads(text.split("data: ", 1)[1]))
        assert text.startswith(f"event: {found[-1]['event']}\n") and text.endswith("\n\n")
        if len(found) == number:
            break
    await events.aclose()
    return found


async def test_the_stream_begins_with_what_rarely_changes_and_ticks_with_what_does():
    status = EngineStatus(num_running=1, requests=(Progress("g", "decode", 10, 10, 3, 20, first_token=1.0),))
    context = make_context(read_status=lambda: status)
    hello, *ticks, health = await first(dashboard.events(context, tick_s=0), 12)
    assert [event["event"] for event in ticks] == ["tick"] * 10
    assert ticks[0]["num_running"] == 1 and ticks[0]["requests"] == []
    for event in (hello, health):
        assert event["capabilities"]["model_name"] == "test/model"
        assert event["diagnostics"]["checks"]["engine"]["status"] == "pass"


async def test_a_tick_has_only_what_finished_since_the_last_one():
    context = make_context()
    async with client_for(context) as client:
        await client.post("/v1/chat/completions", json=chat_body())
        events = dashboard.events(context, tick_s=0)
        hello = json.loads((await anext(events)).decode().split("data: ", 1)[1])
        assert [request["reason"] for request in hello["finished"]] == ["stop"]
        assert json.loads((await anext(events)).decode().split("data: ", 1)[1])["finished"] == []
        await client.post("/v1/chat/completions", json=chat_body())
        await client.post("/v1/chat/completions", json=chat_body(temperature=-1))
        tick = json.loads((await anext(events)).decode().split("data: ", 1)[1])
        assert len(tick["finished"]) == 1 and len(tick["problems"]) == 1
        await events.aclose()


async def test_a_probe_that_is_told_not_yet_is_no_problem():
    context = make_context(phase=Phase.LOADING)
    async with client_for(context) as client:
        assert (await client.get("/health")).status_code == 503
        assert (await client.get("/v1/nowhere")).status_code == 404
    assert [problem.source for problem in context.journal.problems] == ["HTTP 404: GET /v1/nowhere"]


async def test_the_stream_ends_when_the_server_drains():
    context = make_context(phase=Phase.DRAINING)
    assert [json.loads(data.split(b"data: ", 1)[1])["event"] async for data in dashboard.events(context)] == [
        "hello", "tick"]


async def test_the_stream_needs_the_key_and_the_page_does_not():
    async with client_for(make_context(api_keys={"default": "sesame"})) as client:
        assert (await client.get("/dashboard")).status_code == 200
        assert (await client.get("/v1/dashboard")).status_code == 401


async def test_a_reader_that_leaves_ends_its_task():
    context = make_context(FakeGeneration())
    reads = 0

    def read_status():
        nonlocal reads
        reads += 1
        return EngineStatus()

    context.read_status = read_status
    async with live_server(context) as address:
        async with httpx.AsyncClient() as client, client.stream("GET", f"{address}/v1/dashboard") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            await anext(response.aiter_bytes())
            await until(lambda: reads > 0)
    # The server could only shut down because the stream had ended.
