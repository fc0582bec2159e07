"""One MCP server: connected, watched, connected again, and its tools called. Event loop.

A task of its own holds the connection open (the SDK's scopes must be left where they were entered); others call tools
through it. The tools are listed again every minute, which also shows whether anybody is still there.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx2
from mcp import Client, MCPError, StdioServerParameters
from mcp.client.streamable_http import streamable_http_client
from mcp_types import CONNECTION_CLOSED

from vllm_mlx.errors import DeadlineExceeded, Unavailable
from vllm_mlx.mcp_client.config import McpServerConfig

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 60.0
"""`npx` and `uvx` fetch a server when it is first started."""
RELIST_S = 60.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0
STOP_TIMEOUT_S = 6.0
MAX_CALLS = 8
MAX_RESULT_CHARS = 200_000


@dataclass(frozen=True, slots=True)
class McpTool:
    """A tool under the server's own name for it."""

    server: str
    name: str
    description: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        return f"{self.server}__{self.name}"


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What came of a call. `is_error`: the tool says that it failed, and `text` why."""

    text: str
    is_error: bool = False


class McpConnection:
    """`state` is connecting, connected, failed (it is tried again) or stopped."""

    def __init__(self, config: McpServerConfig, *, timeout_s: float, relist_s: float = RELIST_S) -> None:
        self.config = config
        self.state = "stopped"
        self.error: str | None = None
        self.tools: tuple[McpTool, ...] = ()
        self._timeout_s = config.timeout_s or timeout_s
        self._relist_s = relist_s
        self._client: Client | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_stopping = False
        self._wake = asyncio.Event()  # somebody doubts the connection, or it is to be closed
        self._calls = asyncio.Semaphore(MAX_CALLS)
        self.settled = asyncio.Event()
        """Set once the first attempt has ended, well or badly."""

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"mcp {self.config.name}")

    async def stop(self) -> None:
        """Close the connection; a program that was started is ended."""
        if self._task is None:
            return
        self._is_stopping = True
        self._wake.set()
        _, busy = await asyncio.wait({self._task}, timeout=STOP_TIMEOUT_S)
        if busy:  # connecting, or closing a program that will not end
            self._task.cancel()
            await asyncio.wait({self._task})
        self.state = "stopped"

    async def call(self, tool: str, arguments: Mapping[str, Any]) -> ToolResult:
        """Call a tool; raises Unavailable when there is no connection, DeadlineExceeded after the time-out."""
        client = self._client
        if client is None:
            reason = f" ({self.error})" if self.error else ""
            raise Unavailable(f"The MCP server '{self.config.name}' is not connected{reason}.", retry_after_s=5)
        try:
            async with self._calls, asyncio.timeout(self._timeout_s):
                result = await client.call_tool(tool, dict(arguments))
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"The tool '{tool}' of '{self.config.name}' took longer than {self._timeout_s:g} s."
            ) from error
        except Exception as error:  # the boundary to the SDK's transports
            self._wake.set()
            if isinstance(error, MCPError) and not _is_closed(error):
                return ToolResult(self.config.conceal(error.message), is_error=True)  # the server's own answer
            raise Unavailable(f"The MCP server '{self.config.name}' failed: {self._told(error)}.") from error
        return ToolResult(self.config.conceal(_text_of(result)), bool(result.is_error))

    # ── the task that holds the connection ──────────────────────────────────────────────────────────────────────────

    async def _run(self) -> None:
        pause_s = FIRST_PAUSE_S
        while not self._is_stopping:
            self.state = "connecting"
            self._wake.clear()
            try:
                await self._hold()
            except Exception as error:  # the boundary to programs and networks of others
                self.error = self._told(error)
                log.warning("MCP server %s: %s", self.config.name, self.error)
            pause_s = FIRST_PAUSE_S if self.state == "connected" else min(2 * pause_s, LONGEST_PAUSE_S)
            self.state = "failed"
            self.settled.set()
            if not self._is_stopping:
                with suppress(TimeoutError):
                    async with asyncio.timeout(pause_s):
                        await self._wake.wait()

    async def _hold(self) -> None:
        """Connected until the connection breaks, which raises, or is to be closed."""
        config = self.config
        if config.command is not None:
            await self._serve(
                Client(
                    StdioServerParameters(
                        command=config.command, args=list(config.args), env=dict(config.env), cwd=config.cwd
                    )
                )
            )
            return
        assert config.url is not None
        timeout = httpx2.Timeout(30.0, read=max(self._timeout_s, 300.0))
        async with httpx2.AsyncClient(headers=dict(config.headers), timeout=timeout) as http:
            await self._serve(Client(streamable_http_client(config.url, http_client=http)))

    async def _serve(self, client: Client) -> None:
        async with asyncio.timeout(CONNECT_TIMEOUT_S) as connecting, client:
            self.tools = await self._list(client)
            connecting.reschedule(None)
            self._client, self.state, self.error = client, "connected", None
            self.settled.set()
            log.info("MCP server %s: connected, %d tools", self.config.name, len(self.tools))
            try:
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(self._relist_s):
                            await self._wake.wait()
                    if self._is_stopping:
                        return
                    self._wake.clear()
                    # Also after a call that went wrong: it may have been the call and not the connection.
                    async with asyncio.timeout(self._timeout_s):
                        self.tools = await self._list(client)
            finally:
                self._client, self.tools = None, ()

    async def _list(self, client: Client) -> tuple[McpTool, ...]:
        found: list[McpTool] = []
        cursor: str | None = None
        while True:
            page = await client.list_tools(cursor=cursor, cache_mode="refresh")
            found += [
                McpTool(self.config.name, tool.name, tool.description or "", tool.input_schema)
                for tool in page.tools
                if self.config.allows(tool.name)
            ]
            if (cursor := page.next_cursor) is None or len(found) > 1000:
                return tuple(found)

    def _told(self, error: BaseException) -> str:
        """A sentence about an error, the cause of a group of them, without secrets."""
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        if isinstance(error, TimeoutError):
            return "it did not answer in time"
        if isinstance(error, FileNotFoundError):
            return f"the program {self.config.command!r} was not found"
        text = " ".join(str(error).split()) or type(error).__name__
        return self.config.conceal(text)[:300]


def _is_closed(error: MCPError) -> bool:
    """The SDK's own word for a lost connection; servers use the same number for errors of theirs."""
    return error.code == CONNECTION_CLOSED and error.message.lower().startswith("connection closed")


def _text_of(result: Any) -> str:
    """A result's blocks as text; what is no text is named, and the structured form stands in where there is none."""
    parts = []
    for block in result.content:
        if block.type == "text":
            parts.append(block.text)
        elif block.type == "resource" and getattr(block.resource, "text", None) is not None:
            parts.append(block.resource.text)
        elif block.type == "resource_link":
            parts.append(f"{block.name}: {block.uri}")
        else:
            parts.append(f"[{block.type} {getattr(block, 'mime_type', None) or ''}".rstrip() + ", not shown]")
    if not parts and result.structured_content is not None:
        parts.append(json.dumps(result.structured_content, ensure_ascii=False))
    text = "\n".join(parts)
    if len(text) > MAX_RESULT_CHARS:
        text = f"{text[:MAX_RESULT_CHARS]}\n[cut: the result has {len(text)} characters]"
    return text
