"""Real MCP servers in processes of their own: tools listed and called, time-outs, deaths, secrets."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.api.fakes import client_for, make_context
from tests.serving.process import free_port
from vllm_mlx.errors import DeadlineExceeded, InvalidRequest, Unavailable
from vllm_mlx.mcp_client import connection
from vllm_mlx.mcp_client.config import McpServerConfig
from vllm_mlx.mcp_client.toolbox import Toolbox

SERVER = str(Path(__file__).with_name("server.py"))


def stdio(name: str = "local", **fields) -> McpServerConfig:
    return McpServerConfig(name, command=sys.executable, args=(SERVER,), **fields)


@asynccontextmanager
async def toolbox(*servers: McpServerConfig, timeout_s: float = 20.0, **options) -> AsyncIterator[Toolbox]:
    async with Toolbox(servers, timeout_s=timeout_s, **options) as box:
        async with asyncio.timeout(60):
            await box.settled()
        yield box


async def test_tools_of_a_stdio_server_are_listed_called_and_shown_over_http(monkeypatch):
    monkeypatch.setenv("UNRELATED_KEY", "a key of the server itself")
    calls: list[tuple[str, str]] = []
    config = stdio(
        env={"SECRET": "hush-hush-hush"},
        tools=("add", "secret_length", "leak", "sleep"),
        secrets=frozenset({"hush-hush-hush"}),
    )
    async with (
        toolbox(config, observe=lambda server, outcome, seconds: calls.append((server, outcome))) as box,
        client_for(make_context(mcp=box)) as client,
    ):
        listed = (await client.get("/v1/mcp/tools")).json()
        assert listed["count"] == 4 and "local__die" not in {tool["name"] for tool in listed["tools"]}
        add = next(tool for tool in listed["tools"] if tool["name"] == "local__add")
        assert add["description"] == "Add two numbers." and add["server"] == "local"
        assert set(add["parameters"]["properties"]) == {"a", "b"}

        async def execute(name: str, **arguments) -> httpx.Response:
            return await client.post("/v1/mcp/execute", json={"tool_name": name, "arguments": arguments})

        assert (await execute("local__add", a=2, b=3)).json() == {
            "tool_name": "local__add", "content": "5", "is_error": False, "error_message": None
        }  # fmt: skip
        # It has what its entry gives it, and nothing of this process's own keys.
        assert (await execute("local__secret_length")).json()["content"] == "14 nothing"
        wrong = (await execute("local__add", a="x")).json()
        assert wrong["is_error"] and "integer" in wrong["error_message"]
        leaked = (await execute("local__leak")).json()
        assert leaked["is_error"] and "***" in leaked["content"] and "hush" not in leaked["content"]

        for name in ("local__die", "local__ad", "other__add"):
            answer = await execute(name)
            assert answer.status_code == 400 and answer.json()["error"]["param"] == "tool_name"
        assert "did you mean 'local__add'" in (await execute("local__ad")).json()["error"]["message"]
        for body in ({}, {"tool_name": ""}, {"tool_name": "local__add", "arguments": [1]}):
            assert (await client.post("/v1/mcp/execute", json=body)).status_code == 400

        servers = (await client.get("/v1/mcp/servers")).json()["servers"]
        assert servers == [
            {"name": "local", "state": "connected", "transport": "stdio", "tools_count": 4, "error": None}
        ]
        for path in ("/v1/mcp/servers", "/v1/mcp/tools", "/v1/capabilities", "/metrics"):
            assert "hush" not in (await client.get(path)).text
    assert calls == [("local", "ok"), ("local", "ok"), ("local", "tool_error"), ("local", "tool_error")]


async def test_a_slow_tool_ends_with_a_deadline_and_a_dead_server_is_started_again(monkeypatch):
    monkeypatch.setattr(connection, "FIRST_PAUSE_S", 0.0)
    async with toolbox(stdio(timeout_s=1.0)) as box:
        with pytest.raises(DeadlineExceeded, match="longer than 1 s"):
            await box.call("local__sleep", {"seconds": 60})
        assert (await box.call("local__add", {"a": 1, "b": 1})).text == "2", "the connection is as good as before"
        with pytest.raises(Unavailable):
            await box.call("local__die", {})
        async with asyncio.timeout(60):
            while True:
                try:
                    assert (await box.call("local__add", {"a": 2, "b": 2})).text == "4"
                    break
                except Unavailable:
                    await asyncio.sleep(0.05)
                except DeadlineExceeded:
                    pass


async def test_a_server_that_cannot_be_started_harms_nobody_and_says_why():
    missing = McpServerConfig("missing", command="/no/such/program")
    quits = McpServerConfig("quits", command=sys.executable, args=("-c", "pass"))
    async with toolbox(missing, quits) as box, client_for(make_context(mcp=box)) as client:
        servers = (await client.get("/v1/mcp/servers")).json()["servers"]
        assert [server["state"] for server in servers] == ["failed", "failed"]
        assert "was not found" in servers[0]["error"] and servers[1]["error"]
        answer = await client.post("/v1/mcp/execute", json={"tool_name": "missing__x"})
        assert answer.status_code == 503 and "not connected" in answer.json()["error"]["message"]
        assert (await client.get("/v1/mcp/tools")).json() == {"tools": [], "count": 0}


async def test_a_streamable_http_server_is_reached_with_its_headers():
    port = free_port()
    process = subprocess.Popen([sys.executable, SERVER, str(port)], stderr=subprocess.DEVNULL)
    try:
        async with httpx.AsyncClient() as client, asyncio.timeout(60):
            while True:
                try:
                    await client.get(f"http://127.0.0.1:{port}/mcp")
                    break
                except httpx.TransportError:
                    await asyncio.sleep(0.05)
        config = McpServerConfig("web", url=f"http://127.0.0.1:{port}/mcp", headers={"x-key": "secret"})
        async with toolbox(config) as box:
            assert box.connections[0].state == "connected", box.connections[0].error
            assert (await box.call("web__add", {"a": 20, "b": 22})).text == "42"
            with pytest.raises(InvalidRequest):
                await box.call("web__nothing", {})
    finally:
        process.kill()
        process.wait()


async def test_without_servers_the_routes_name_the_flag():
    async with client_for(make_context()) as client:
        for answer in (
            await client.get("/v1/mcp/tools"),
            await client.get("/v1/mcp/servers"),
            await client.post("/v1/mcp/execute", json={"tool_name": "a__b"}),
        ):
            assert answer.status_code == 503 and "--mcp-config" in answer.json()["error"]["message"]
        assert not (await client.get("/v1/capabilities")).json()["features"]["mcp"]
