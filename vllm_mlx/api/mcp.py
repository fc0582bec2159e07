"""GET /v1/mcp/tools and /v1/mcp/servers, POST /v1/mcp/execute: the MCP servers that the operator has connected."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends
from pydantic import Field
from starlette.requests import Request
from starlette.responses import Response

from vllm_mlx.api.body import json_body, read_body
from vllm_mlx.api.context import McpTools, ServerContext, get_context
from vllm_mlx.api.requests import json_response
from vllm_mlx.api.sse import watch_client
from vllm_mlx.api.wire import WireModel
from vllm_mlx.errors import Unavailable

router = APIRouter(tags=["MCP"])

Context = Annotated[ServerContext, Depends(get_context)]


class ExecuteRequest(WireModel):
    """`tool_name` is a name of /v1/mcp/tools: the server's name, two underscores, the tool's."""

    tool_name: str = Field(min_length=1)
    arguments: dict[str, Any] | None = None


@router.get("/v1/mcp/tools", summary="The tools of all connected MCP servers")
async def list_tools(context: Context) -> Response:
    tools = [
        {"name": tool.full_name, "description": tool.description, "server": tool.server, "parameters": tool.parameters}
        for tool in _require(context).tools()
    ]
    return json_response({"tools": tools, "count": len(tools)})


@router.get(
    "/v1/mcp/servers",
    summary="The MCP servers and whether they are connected",
    description="`state` is connecting, connected, failed (it is tried again) or stopped.",
)
async def list_servers(context: Context) -> Response:
    servers = [
        {
            "name": connection.config.name,
            "state": connection.state,
            "transport": connection.config.transport,
            "tools_count": len(connection.tools),
            "error": connection.error,
        }
        for connection in _require(context).connections
    ]
    return json_response({"servers": servers})


@router.post(
    "/v1/mcp/execute",
    summary="Call a tool",
    description="A tool that fails answers 200 with `is_error` and `error_message`; a server that is not connected is "
    "a 503, one that takes too long a 504.",
    openapi_extra=json_body(ExecuteRequest),
)
async def execute(http: Request, context: Context) -> Response:
    toolbox = _require(context)
    body = await read_body(http, ExecuteRequest)
    async with watch_client(http.receive):
        result = await toolbox.call(body.tool_name, body.arguments or {})
    return json_response(
        {
            "tool_name": body.tool_name,
            "content": result.text,
            "is_error": result.is_error,
            "error_message": result.text if result.is_error else None,
        }
    )


def _require(context: ServerContext) -> McpTools:
    if context.mcp is None:
        raise Unavailable("This server has no MCP servers; start it with --mcp-config FILE.")
    return context.mcp
