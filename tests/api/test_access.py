"""Claims about who may call, how much, and what every answer carries: the middleware around all routes."""

from __future__ import annotations

import pytest

from tests.api.fakes import FakeGeneration, chat_body, client_for, make_context
from vllm_mlx.api.limits import RateLimit
from vllm_mlx.settings import Settings

CHAT = "/v1/chat/completions"
KEYS = {"alice": "sk-alice", "bob": "sk-bob"}


async def test_every_answer_has_a_request_id_and_a_given_one_is_kept():
    async with client_for(make_context()) as client:
        assert (await client.get("/health")).headers["x-request-id"].startswith("req_")
        kept = await client.post(CHAT, json=chat_body(), headers={"x-request-id": "mine-1"})
        assert kept.headers.get_list("x-request-id") == ["mine-1"]
        streamed = await client.post(CHAT, json=chat_body(stream=True), headers={"x-request-id": "mine-2"})
        assert streamed.headers["x-request-id"] == "mine-2"
        missing = await client.get("/nowhere", headers={"x-request-id": "mine-3"})
        assert missing.headers["x-request-id"] == "mine-3"


@pytest.mark.parametrize("given", ["a" * 200, "a b", "ä", "", "a;b"])
async def test_a_request_id_that_is_not_safe_to_log_is_replaced(given):
    async with client_for(make_context()) as client:
        response = await client.get("/health", headers={"x-request-id": given.encode()})
        assert response.headers["x-request-id"].startswith("req_")


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({}, "missing_api_key"),
        ({"authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"authorization": "Bearer "}, "missing_api_key"),
        ({"authorization": "Basic sk-alice"}, "missing_api_key"),
        ({"x-api-key": "wrong"}, "invalid_api_key"),
        ({"x-api-key": "sk-alice", "authorization": "Bearer wrong"}, "invalid_api_key"),
        ({"x-api-key": "sk-alicE"}, "invalid_api_key"),
    ],
)
async def test_without_a_valid_key_nothing_but_401(headers, code):
    service = FakeGeneration()
    async with client_for(make_context(service, api_keys=KEYS)) as client:
        response = await client.post(CHAT, json=chat_body(), headers=headers)
        assert response.status_code == 401 and response.json()["error"]["code"] == code
        assert response.headers["www-authenticate"] == "Bearer"
        anthropic = (await client.post("/v1/messages", json={}, headers=headers)).json()
        assert anthropic["type"] == "error" and anthropic["error"]["type"] == "authentication_error"
    assert not service.requests


@pytest.mark.parametrize(
    "headers", [{"authorization": "Bearer sk-bob"}, {"authorization": "bearer sk-bob"}, {"x-api-key": "sk-bob"}]
)
async def test_each_key_works_in_either_header_and_has_a_cache_of_its_own(headers):
    service = FakeGeneration()
    async with client_for(make_context(service, api_keys=KEYS)) as client:
        assert (await client.post(CHAT, json=chat_body(), headers=headers)).status_code == 200
    assert service.requests[0].client == "key:bob" and service.requests[0].namespace == "key:bob/"


async def test_a_shared_cache_has_one_namespace():
    service = FakeGeneration()
    settings = Settings().with_values(server__shared_cache=True)
    async with client_for(make_context(service, api_keys=KEYS, settings=settings)) as client:
        await client.post(CHAT, json=chat_body(), headers={"x-api-key": "sk-bob"})
    assert service.requests[0].namespace == ""


async def test_only_health_and_static_pages_are_open():
    context = make_context(api_keys=KEYS)
    async with client_for(context) as client:
        for path in ("/health", "/health/ready", "/health/live", "/openapi.json", "/docs"):
            assert (await client.get(path)).status_code == 200, path
        assert (await client.head("/")).status_code == 200
        for path in (
            "/v1/models", "/v1/capabilities", "/v1/status", "/v1/cache/stats", "/health/diagnostics", "/metrics",
            "/v1/requests", "/nowhere",
        ):  # fmt: skip
            assert (await client.get(path)).status_code == 401, path


async def test_more_requests_than_allowed_are_429_with_retry_after_by_caller():
    settings = Settings().with_values(server__rate_limit=2)
    async with client_for(make_context(api_keys=KEYS, settings=settings)) as client:
        alice, bob = {"x-api-key": "sk-alice"}, {"x-api-key": "sk-bob"}
        for _ in range(2):
            assert (await client.post(CHAT, json=chat_body(), headers=alice)).status_code == 200
        refused = await client.post(CHAT, json=chat_body(), headers=alice)
        assert refused.status_code == 429 and refused.json()["error"]["code"] == "rate_limit_exceeded"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert (await client.post(CHAT, json=chat_body(), headers=bob)).status_code == 200
        assert (await client.get("/v1/models", headers=alice)).status_code == 200


async def test_invented_keys_do_not_get_around_the_rate_limit_of_an_open_server():
    settings = Settings().with_values(server__rate_limit=1)
    async with client_for(make_context(settings=settings)) as client:
        statuses = [
            (await client.post(CHAT, json=chat_body(), headers={"x-api-key": f"k{i}"})).status_code for i in range(2)
        ]
    assert statuses == [200, 429]


def test_the_rate_window_slides_and_forgets():
    now = 0.0
    limit = RateLimit(lambda *_: None, requests_per_minute=1, clock=lambda: now)
    assert limit._admit("a") is None
    now = 30.0
    assert limit._admit("a") == 30.0 and limit._admit("b") is None
    now = 60.0
    assert limit._admit("a") is None


def test_the_rate_limit_remembers_a_bounded_number_of_callers():
    limit = RateLimit(lambda *_: None, requests_per_minute=1)
    for i in range(limit.MAX_CALLERS + 10):
        limit._admit(str(i))
    assert len(limit._times) == limit.MAX_CALLERS


async def test_bodies_above_the_limit_are_413_stated_or_chunked():
    settings = Settings().with_values(server__max_body_mb=0.001)
    body = b'{"messages": "' + b"x" * 2000 + b'"}'

    async def pieces():
        for i in range(0, len(body), 500):
            yield body[i : i + 500]

    async with client_for(make_context(settings=settings)) as client:
        for content in (body, pieces()):
            response = await client.post(CHAT, content=content)
            assert response.status_code == 413, response.text
            assert response.json()["error"]["type"] == "invalid_request_error" and "MiB" in response.text
        anthropic = await client.post("/v1/messages", content=body)
        assert anthropic.status_code == 413 and anthropic.json()["error"]["type"] == "request_too_large"


async def test_browsers_of_allowed_origins_may_call_and_read_errors():
    settings = Settings().with_values(server__cors_origin=("https://chat.example",))
    async with client_for(make_context(api_keys=KEYS, settings=settings)) as client:
        preflight = await client.options(
            CHAT,
            headers={
                "origin": "https://chat.example",
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization,content-type",
            },
        )
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://chat.example"
        refused = await client.post(CHAT, json=chat_body(), headers={"origin": "https://chat.example"})
        assert refused.status_code == 401
        assert refused.headers["access-control-allow-origin"] == "https://chat.example"
        other = await client.get("/health", headers={"origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers


async def test_without_the_setting_no_origin_is_allowed():
    async with client_for(make_context()) as client:
        response = await client.get("/health", headers={"origin": "https://a.example"})
    assert "access-control-allow-origin" not in response.headers


async def test_unknown_paths_and_methods_have_openais_error_shape():
    async with client_for(make_context()) as client:
        missing = await client.get("/v1/nothing")
        assert missing.status_code == 404 and set(missing.json()["error"]) == {"message", "type", "param", "code"}
        wrong = await client.get(CHAT)
        assert wrong.status_code == 405 and wrong.json()["error"]["type"] == "invalid_request_error"
        assert "POST" in wrong.headers["allow"]


async def test_two_applications_in_one_process_share_nothing():
    one, two = make_context(), make_context(api_keys=KEYS)
    async with client_for(one) as first, client_for(two) as second:
        assert (await first.post(CHAT, json=chat_body())).status_code == 200
        assert (await second.post(CHAT, json=chat_body())).status_code == 401
    assert one.live.num_finished == 1 and two.live.num_finished == 0
    assert b'status="401"' not in one.metrics.render() and b'status="401"' in two.metrics.render()
