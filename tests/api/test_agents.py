"""How agents are known: background names run behind the others, sessions are shown, probes are answered."""

from __future__ import annotations

import asyncio

import pytest

from tests.api.fakes import MODEL_ID, FakeGeneration, chat_body, client_for, finished, make_context, until
from vllm_mlx.parsers.events import TextDelta
from vllm_mlx.settings import Settings

ROUTES = {
    "/v1/chat/completions": chat_body(),
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi"},
    "/v1/messages": {"max_tokens": 5, "messages": [{"role": "user", "content": "Hi"}]},
}


@pytest.mark.parametrize("path", ROUTES)
async def test_requests_under_a_small_models_name_run_behind_the_others(path):
    service = FakeGeneration()
    async with client_for(make_context(service)) as client:
        for name in ("claude-haiku-4-5", "gpt-5-mini", "claude-opus-4", "default", MODEL_ID):
            assert (await client.post(path, json={**ROUTES[path], "model": name})).status_code == 200
        await client.post(path, json={**ROUTES[path], "model": "claude-haiku-4-5", "priority": 3})
    assert [request.priority for request in service.requests] == [100, 100, 0, 0, 0, 3]


async def test_which_names_are_small_models_is_the_operators_choice():
    service = FakeGeneration()
    settings = Settings().with_values(
        agents__background_model=("tiny-*",), server__strict_model_id=True, server__model_alias=("tiny-1=default",)
    )
    async with client_for(make_context(service, settings=settings)) as client:
        assert (await client.post("/v1/chat/completions", json=chat_body(model="tiny-1"))).status_code == 200
        assert (await client.post("/v1/chat/completions", json=chat_body(model="tiny-2"))).status_code == 404
    assert [request.priority for request in service.requests] == [100]


async def test_the_served_models_own_name_is_never_a_background_name():
    service = FakeGeneration()
    settings = Settings().with_values(agents__background_model=("*",))
    async with client_for(make_context(service, settings=settings)) as client:
        await client.post("/v1/chat/completions", json=chat_body(model=MODEL_ID))
    assert service.requests[0].priority == 0


@pytest.mark.parametrize("header", ["X-Session-Id", "X-Claude-Code-Session-Id", "session-id", "x-session-affinity"])
async def test_a_session_is_told_by_its_header_and_requests_are_found_by_it(header):
    service = FakeGeneration()

    def script(request):
        return [TextDelta("a"), service.cancel_events[request.id].wait, finished("cancelled")]

    service.script = script
    async with client_for(make_context(service)) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat_body(), headers={header: "s-1"}))
        await until(lambda: bool(service.running))
        (mine,) = (await client.get("/v1/requests", params={"session": "s-1"})).json()["data"]
        assert mine["session"] == "s-1" and mine["request_id"] in service.running
        assert (await client.get("/v1/requests", params={"session": "s-2"})).json()["data"] == []
        await client.post(f"/v1/requests/{mine['id']}/cancel")
        assert (await asking).json()["choices"][0]["message"]["content"] == "a"


async def test_agents_find_what_they_probe_for():
    async with client_for(make_context()) as client:
        assert (await client.head("/")).status_code == 200
        catalogue = (await client.get("/v1/models", params={"client_version": "0.169.0"})).json()
        assert catalogue["models"] == [] and catalogue["data"][0]["id"] == MODEL_ID
        assert "models" not in (await client.get("/v1/models")).json()


async def test_a_missing_model_is_told_in_the_shape_of_whoever_asks():
    async with client_for(make_context()) as client:
        theirs = await client.get("/v1/models/none", headers={"anthropic-version": "2023-06-01"})
        ours = await client.get("/v1/models/none")
    assert theirs.status_code == ours.status_code == 404
    assert theirs.json()["type"] == "error" and theirs.json()["error"]["type"] == "not_found_error"
    assert theirs.headers["request-id"] == theirs.json()["request_id"]
    assert ours.json()["error"]["param"] == "model"


async def test_one_key_does_not_end_anothers_request():
    service = FakeGeneration()

    def script(request):
        return [TextDelta("a"), service.cancel_events[request.id].wait, finished("cancelled")]

    service.script = script
    mine, other = ({"authorization": f"Bearer key-{name}"} for name in "ab")
    async with client_for(make_context(service, api_keys={"a": "key-a", "b": "key-b"})) as client:
        asking = asyncio.create_task(client.post("/v1/chat/completions", json=chat_body(), headers=mine))
        await until(lambda: bool(service.running))
        path = f"/v1/requests/{next(iter(service.running))}/cancel"
        assert (await client.post(path, headers=other)).status_code == 404
        assert (await client.post(path, headers=mine)).status_code == 200
        assert (await asking).status_code == 200
