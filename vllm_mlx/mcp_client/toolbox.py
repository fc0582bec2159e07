"""All MCP servers together: which tools there are, by their full names, and calling one. Event loop."""

from __future__ import annotations

import asyncio
import difflib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.mcp_client.config import McpServerConfig
from vllm_mlx.mcp_client.connection import McpConnection, McpTool, ToolResult

Observe = Callable[[str, str, float], None]
"""Told of each call: server, "ok", "tool_error" or "failed", and the seconds it took."""


class Toolbox:
    """Connects to every server on entering, and closes them on leaving. A server that fails is tried again."""

    def __init__(
        self,
        servers: Sequence[McpServerConfig],
        *,
        timeout_s: float,
        observe: Observe = lambda server, outcome, seconds: None,
    ) -> None:
        self.connections = tuple(McpConnection(server, timeout_s=timeout_s) for server in servers)
        self._observe = observe

    async def __aenter__(self) -> Toolbox:
        for connection in self.connections:
            connection.start()
        return self

    async def __aexit__(self, *error: object) -> None:
        await asyncio.gather(*(connection.stop() for connection in self.connections))

    async def settled(self) -> None:
        """Wait until each server has been tried once."""
        await asyncio.gather(*(connection.settled.wait() for connection in self.connections))

    def tools(self) -> tuple[McpTool, ...]:
        """Tools of the connected servers, in a steady order: prompts that list them should begin alike."""
        return tuple(tool for connection in self.connections for tool in connection.tools)

    def has(self, full_name: str) -> bool:
        return any(tool.full_name == full_name for tool in self.tools())

    async def call(self, full_name: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call `server__tool`; raises InvalidRequest for a name that is not there, and as `McpConnection.call`."""
        for connection in self.connections:
            prefix = f"{connection.config.name}__"
            if not full_name.startswith(prefix):
                continue
            name = full_name.removeprefix(prefix)
            # Of a server that is away nothing is known: its own error says more than "no such tool".
            if connection.config.allows(name) and (
                connection.state != "connected" or any(tool.name == name for tool in connection.tools)
            ):
                return await self._timed(connection, name, arguments)
        names = [tool.full_name for tool in self.tools()]
        near = difflib.get_close_matches(full_name, names, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "; GET /v1/mcp/tools lists those there are."
        raise InvalidRequest(f"There is no MCP tool '{full_name}'{hint}", param="tool_name", code="tool_not_found")

    async def _timed(self, connection: McpConnection, name: str, arguments: Mapping[str, Any]) -> ToolResult:
        started, outcome = time.monotonic(), "failed"
        try:
            result = await connection.call(name, arguments)
            outcome = "tool_error" if result.is_error else "ok"
            return result
        finally:
            self._observe(connection.config.name, outcome, time.monotonic() - started)
