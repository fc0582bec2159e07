"""The front's HTTP side, in front of scripted children that die where a test wants it. In process, no sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx
import pytest

from vllm_mlx.supervisor.proxy import Proxy


class Body(httpx.AsyncByteStream):
    """A body in parts, which breaks off behind them if it `dies`."""

    def __init__(self, *parts: bytes, dies: bool = False) -> None:
        self._parts = parts
        self._dies = dies

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for part in self._parts:
            yield part
        if self._dies:
            raise httpx.ReadError("the peer is gone")


@dataclass
class FakeChild:
    client: httpx.AsyncClient
    has_ended: bool = False

    async def gone(self) -> None:
        self.has_ended = True


Handler = Callable[[httpx.Request], httpx.Response]


@dataclass
class Children:
    """Serves the next script at each try; the last one stays."""

    scripts: list[Handler]
    num_given: int = 0
    requests: list[httpx.Request] = field(default_factory=list)

    async def ready(self) -> FakeChild | None:
        script = self.scripts[min(self.num_given, len(self.scripts) - 1)]
        self.num_given += 1

        def handle(request: httpx.Request) -> httpx.Response:
            self.requests.append(request)
            child.has_ended = script is still_loading
            return script(request)

        child = FakeChild(httpx.AsyncClient(transport=httpx.MockTransport(handle), base_url="http://engine"))
        return child

    @property
    def current(self) -> None:
        return None

    def report(self) -> dict[str, object]:
        return {"pid": 1, "num_crashes": 2, "last_crash": "it was ended by SIGABRT"}


@asynccontextmanager
async def front(*scripts: Handler, calls_tools: bool = False) -> AsyncIterator[tuple[httpx.AsyncClient, Children]]:
    children = Children(list(scripts))
    proxy = Proxy(children, max_body_bytes=1000, calls_tools=calls_tools)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=proxy), base_url="http://front") as client:
        yield client, children


def refuse(request: httpx.Request) -> httpx.Response:
    raise httpx.ConnectError("nobody there")


def still_loading(request: httpx.Request) -> httpx.Response:
    """What the next child says when it finds the connection in the backlog."""
    return httpx.Response(503, content=Body(b"loading"))


def answer(request: httpx.Request) -> httpx.Response:
    return httpx.Response(201, headers={"x-request-id": "r1"}, content=Body(b"echo:", request.content))


def stream(*parts: bytes, dies: bool = True) -> Handler:
    def handle(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, content=Body(*parts, dies=dies))

    return handle


async def test_a_request_is_passed_on_as_it_came_with_the_clients_address() -> None:
    async with front(answer) as (client, children):
        response = await client.post("/v1/x%2Fy?beta=true", content=b"hello", headers={"x-forwarded-for": "6.6.6.6"})
    assert (response.status_code, response.content) == (201, b"echo:hello")
    assert response.headers["x-request-id"] == "r1"
    request = children.requests[0]
    assert request.url.raw_path == b"/v1/x%2Fy?beta=true"
    assert request.headers.get_list("x-forwarded-for") == ["127.0.0.1"]


async def test_what_had_shown_nothing_is_asked_again() -> None:
    cut_off = stream(b": keep-alive\n\n", b"event: message_start\ndata: 1\n\n")
    whole = stream(b"event: message_start\ndata: 2\n\n", b"event: content_block_start\ndata: 3\n\n", dies=False)
    async with front(refuse, cut_off, whole) as (client, children):
        response = await client.post("/v1/messages", content=b"ask")
    assert [request.content for request in children.requests] == [b"ask"] * 3
    assert response.status_code == 200
    assert response.text == (
        ": keep-alive\n\nevent: message_start\ndata: 2\n\nevent: content_block_start\ndata: 3\n\n"
    )


async def test_a_stream_that_had_begun_ends_with_an_error_event() -> None:
    async with front(stream(b'data: {"a":1}\n\n')) as (client, children):
        response = await client.post("/v1/chat/completions", content=b"{}")
    assert len(children.requests) == 1
    assert response.text.startswith('data: {"a":1}\n\ndata: {"error":') and response.text.endswith("data: [DONE]\n\n")


async def test_a_whole_answer_that_was_cut_off_is_asked_again() -> None:
    def cut_off(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"content-length": "100"}, content=Body(b"half", dies=True))

    async with front(cut_off, answer) as (client, _):
        response = await client.post("/v1/chat/completions", content=b"x")
    assert (response.status_code, response.content) == (201, b"echo:x")


async def test_the_next_childs_word_that_it_is_loading_is_not_passed_on() -> None:
    async with front(still_loading, answer) as (client, _):
        response = await client.post("/v1/chat/completions", content=b"x")
    assert (response.status_code, response.content) == (201, b"echo:x")


async def test_a_request_that_was_in_three_crashes_is_given_up() -> None:
    async with front(refuse) as (client, children):
        response = await client.post("/v1/messages", content=b"poison")
    assert response.status_code == 503 and response.json()["type"] == "error" and len(children.requests) == 3


CHANGING = [
    ("POST", "/v1/mcp/execute"),
    ("POST", "/v1/models/a/b/load"),
    ("POST", "/v1/models/x/unload"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("DELETE", "/v1/cache"),
    ("DELETE", "/v1/responses/r1"),
    ("POST", "/v1/responses/r1/cancel"),
]


@pytest.mark.parametrize(("method", "path"), CHANGING)
async def test_what_changes_something_is_not_asked_again(method: str, path: str) -> None:
    def cut_off(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=Body(b'{"content"', dies=True))

    def broken(request: httpx.Request) -> httpx.Response:
        raise httpx.RemoteProtocolError("the peer closed the connection")

    for script in (cut_off, broken):
        async with front(script, answer) as (client, children):
            response = await client.request(method, path, content=b"{}")
        assert len(children.requests) == 1
        assert response.status_code == 502 and "may have been carried out or not" in response.json()["error"]["message"]


@pytest.mark.parametrize("script", [refuse, still_loading])
async def test_what_reached_no_engine_is_asked_again_whatever_it_is(script: Handler) -> None:
    async with front(script, answer) as (client, children):
        response = await client.post("/v1/mcp/execute", content=b"x")
    assert (response.status_code, len(children.requests)) == (201, 2)


async def test_an_answer_that_may_have_called_tools_is_not_generated_again() -> None:
    cut_off = stream(b": keep-alive\n\n")
    async with front(cut_off, answer, calls_tools=True) as (client, children):
        response = await client.post("/v1/chat/completions", content=b"{}")
        assert len(children.requests) == 1 and "may have been carried out or not" in response.text
        assert (await client.post("/v1/embeddings", content=b"x")).status_code == 201


async def test_health_is_answered_without_a_child() -> None:
    async with front(refuse) as (client, children):
        for path, status in (("/health", 503), ("/health/ready", 503), ("/health/live", 200)):
            response = await client.get(path)
            assert response.status_code == status and not children.requests
            assert response.json()["status"] == "restarting" and response.json()["engine_process"]["num_crashes"] == 2


async def test_a_body_that_is_too_large_goes_no_further() -> None:
    async with front(answer) as (client, children):
        response = await client.post("/v1/chat/completions", content=b"x" * 2000)
    assert response.status_code == 413 and not children.requests
