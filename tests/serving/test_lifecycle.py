"""Claims about start and end of a server: loading, failing to load, draining, being told twice. In this process."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from tests.api.fakes import FakeGeneration, chat_body, finished, make_context, says, sse_payloads, until
from vllm_mlx.api.context import Phase, ServedModel, ServerContext
from vllm_mlx.app import build_app
from vllm_mlx.errors import ModelLoadError, VllmMlxError
from vllm_mlx.lifecycle import Lifecycle, bind, make_http_server
from vllm_mlx.parsers.events import TextDelta
from vllm_mlx.settings import Settings

SERVER = Settings().with_values(server__port=0).server


class FakeLoaded:
    """Parts whose `close` ends what the fake service still runs, as the engine's stop does."""

    def __init__(self, service: FakeGeneration) -> None:
        self.service = service
        self.ended = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        self.is_draining = False
        self.is_stuck = False

    def install(self, context: ServerContext) -> None:
        context.service, context.model = self.service, ServedModel("m")

    def describe(self) -> str:
        return "a fake"

    def start_drain(self) -> None:
        self.is_draining = True

    def close(self, timeout_s: float) -> bool:
        self.loop.call_soon_threadsafe(self.ended.set)
        return not self.is_stuck


class Running:
    """A lifecycle under test."""

    def __init__(self, load: Callable[[], FakeLoaded] | None, script=None, shutdown_timeout_s: float = 30.0) -> None:
        self.context = make_context(phase=Phase.LOADING, model=None)
        self.context.service = None
        self.loaded = FakeLoaded(FakeGeneration(script or (lambda r: says("Hello"))))
        self.announced: list[str] = []
        listener = bind(SERVER)
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.http = make_http_server(build_app(self.context), SERVER)
        self.lifecycle = Lifecycle(
            self.http,
            listener,
            self.context,
            load or (lambda: self.loaded),
            lambda loaded: self.announced.append(loaded.describe()),
            shutdown_timeout_s=shutdown_timeout_s,
        )
        self.task = asyncio.create_task(self.lifecycle.run())

    async def ended(self) -> None:
        async with asyncio.timeout(20):
            await self.task


@asynccontextmanager
async def running(load=None, **options):
    server = Running(load, **options)
    await until(lambda: server.http.started)
    async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
        try:
            yield server, client
        finally:
            if not server.task.done():
                server.loaded.ended.set()
                for _ in range(2):
                    os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.wait({server.task}, timeout=20)


async def ready(server: Running) -> None:
    await until(lambda: server.context.phase is Phase.READY)


async def test_while_loading_health_is_503_and_then_200():
    gate = threading.Event()
    holder: list[Running] = []

    def load():
        gate.wait(20)
        return holder[0].loaded

    async with running(load) as (server, client):
        holder.append(server)
        response = await client.get("/health")
        assert response.status_code == 503 and response.json()["status"] == "loading"
        refused = await client.post("/v1/chat/completions", json=chat_body())
        assert refused.status_code == 503 and refused.headers["retry-after"]
        assert server.announced == []
        gate.set()
        await ready(server)
        assert (await client.get("/health")).status_code == 200 and server.announced == ["a fake"]
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 200


async def test_a_failure_to_load_is_raised_and_the_server_stops_listening():
    def load():
        raise ModelLoadError("no such model")

    async with running(load) as (server, client):
        with pytest.raises(ModelLoadError, match="no such model"):
            await server.ended()
        with pytest.raises(httpx.TransportError):
            await client.get("/health")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_an_idle_server(number):
    async with running() as (server, _):
        await ready(server)
        os.kill(os.getpid(), number)
        await server.ended()
        assert server.loaded.is_draining and not server.lifecycle.is_stuck


async def test_a_signal_while_loading_ends_the_server_and_says_that_a_thread_is_busy():
    gate = threading.Event()
    async with running(lambda: gate.wait(20)) as (server, _):
        os.kill(os.getpid(), signal.SIGTERM)
        await server.ended()
        assert server.lifecycle.is_stuck
        gate.set()


async def test_what_runs_may_finish_and_nothing_new_begins():
    proceed = asyncio.Event()
    async with running(script=lambda r: [TextDelta("a"), proceed.wait, *says("b")]) as (server, client):
        await ready(server)
        answers = [
            asyncio.create_task(client.post("/v1/chat/completions", json=chat_body(stream=stream)))
            for stream in (False, True)
        ]
        await until(lambda: len(server.loaded.service.running) == 2)
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: server.context.phase is Phase.DRAINING)
        assert (await client.get("/health")).json()["status"] == "draining"
        assert (await client.post("/v1/chat/completions", json=chat_body())).status_code == 503
        proceed.set()
        whole, streamed = await asyncio.gather(*answers)
        assert whole.json()["choices"][0]["message"]["content"] == "ab"
        assert sse_payloads(streamed.text)[-1]["choices"][0]["finish_reason"] == "stop"
        await server.ended()


@pytest.mark.parametrize(("shutdown_timeout_s", "num_signals"), [(0.1, 1), (30.0, 2)])
async def test_what_does_not_finish_is_ended_with_an_error_after_the_limit_or_a_second_signal(
    shutdown_timeout_s, num_signals
):
    server: Running

    def script(request):
        return [TextDelta("a"), server.loaded.ended.wait, finished("error", error="the server is shutting down")]

    async with running(script=script, shutdown_timeout_s=shutdown_timeout_s) as (server, client):
        await ready(server)
        answers = [
            asyncio.create_task(client.post("/v1/chat/completions", json=chat_body(stream=stream)))
            for stream in (False, True)
        ]
        await until(lambda: len(server.loaded.service.running) == 2)
        for _ in range(num_signals):
            os.kill(os.getpid(), signal.SIGTERM)
            await until(lambda: server.context.phase is Phase.DRAINING)
        whole, streamed = await asyncio.gather(*answers)
        assert whole.status_code == 500 and "shutting down" in whole.json()["error"]["message"]
        assert "shutting down" in sse_payloads(streamed.text)[-1]["error"]["message"]
        await server.ended()


async def test_a_thread_that_does_not_stop_is_told_of():
    async with running() as (server, _):
        server.loaded.is_stuck = True
        await ready(server)
        os.kill(os.getpid(), signal.SIGTERM)
        await server.ended()
        assert server.lifecycle.is_stuck


def test_a_port_in_use_is_told_in_one_sentence():
    with bind(SERVER) as taken:
        taken.listen()
        taken_settings = Settings().with_values(server__port=taken.getsockname()[1]).server
        with pytest.raises(VllmMlxError, match="Choose another --port"):
            bind(taken_settings)
