"""An MCP server for tests, made with the official SDK: `python server.py [stdio|streamable-http PORT]`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys

from mcp.server import MCPServer

server = MCPServer("test")
logging.disable(logging.CRITICAL)


@server.tool()
def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


@server.tool()
def secret_length() -> str:
    """How long the variable SECRET is, and what HOME_KEY is here."""
    return f"{len(os.environ.get('SECRET', ''))} {os.environ.get('UNRELATED_KEY', 'nothing')}"


@server.tool()
def leak() -> str:
    """Fails, and says its secret."""
    from mcp import MCPError

    raise MCPError(-32050, f"the key {os.environ.get('SECRET')} was refused")


@server.tool()
async def sleep(seconds: float) -> str:
    """Sleep."""
    await asyncio.sleep(seconds)
    return "slept"


@server.tool()
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return json.dumps({"temperature": 21})


@server.tool()
def process_id() -> int:
    """The id of this process."""
    return os.getpid()


@server.tool()
def die() -> str:
    """End the server's process."""
    os._exit(1)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        server.run("streamable-http", port=int(sys.argv[1]))
    else:
        server.run("stdio")
