"""What a request must satisfy before any work is done for it: cheap checks, each answered with the field's name.

Not here: ranges of sampling values (`defaults.py`), the context length (`prompt.py`), what a grammar supports
(`grammar.py`). Pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import ChatMessage, GenerationRequest, Tool, ToolChoice

ROLES = ("system", "user", "assistant", "tool")
MAX_SCHEMA_CHARACTERS = 1_000_000
MAX_SCHEMA_DEPTH = 100
MAX_STOPS = 64
MAX_STOP_CHARACTERS = 4096


def check_request(request: GenerationRequest, *, vocab_size: int) -> None:
    """Raise InvalidRequest for the first thing that is wrong."""
    if request.prompt is None:
        check_messages(request.messages)
    elif request.messages:
        raise InvalidRequest("Give messages or a prompt, not both.", param="prompt")
    check_tools(request.tools, request.tool_choice)
    if request.output_format is not None:
        check_schema(request.output_format.value, request.output_format.param)
    if request.max_tokens is not None and request.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {request.max_tokens}.", param="max_tokens")
    if request.timeout_s is not None and not request.timeout_s > 0:
        raise InvalidRequest(f"timeout must be more than 0 seconds, not {request.timeout_s}.", param="timeout")
    if len(request.stop) > MAX_STOPS:
        raise InvalidRequest(f"At most {MAX_STOPS} stop strings can be given, not {len(request.stop)}.", param="stop")
    for i, stop in enumerate(request.stop):
        if not stop or len(stop) > MAX_STOP_CHARACTERS:
            raise InvalidRequest(
                f"A stop string has 1 to {MAX_STOP_CHARACTERS} characters, not {len(stop)}.", param=f"stop.{i}"
            )
    for i, token_id in enumerate(request.stop_token_ids):
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"Token {token_id} does not exist; this model's tokens are 0 to {vocab_size - 1}.",
                param=f"stop_token_ids.{i}",
            )
    budget = request.reasoning.max_tokens
    if budget is not None and budget < 0:
        raise InvalidRequest(f"max_thinking_tokens cannot be negative ({budget}).", param="max_thinking_tokens")


def check_messages(messages: tuple[ChatMessage, ...]) -> None:
    if not messages:
        raise InvalidRequest("messages is empty; a conversation has at least one message.", param="messages")
    call_ids: set[str] = set()
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(
                f"Unknown role {message.role!r}; a role is one of {', '.join(ROLES)}.", param=f"messages.{i}.role"
            )
        if message.tool_calls and message.role != "assistant":
            raise InvalidRequest("Only assistant messages have tool calls.", param=f"messages.{i}.tool_calls")
        for j, call in enumerate(message.tool_calls):
            if not call.name:
                raise InvalidRequest(
                    "A tool call needs the name of its function.", param=f"messages.{i}.tool_calls.{j}.function.name"
                )
            call_ids.add(call.id)
        if message.role == "tool" and message.tool_call_id is not None and message.tool_call_id not in call_ids:
            raise InvalidRequest(
                f"No earlier assistant message made a tool call with the id {message.tool_call_id!r}.",
                param=f"messages.{i}.tool_call_id",
            )


def check_tools(tools: tuple[Tool, ...], choice: ToolChoice) -> None:
    names: set[str] = set()
    for i, tool in enumerate(tools):
        if not tool.name:
            raise InvalidRequest("A tool needs a name.", param=f"tools.{i}.function.name")
        if tool.name in names:
            raise InvalidRequest(f"Two tools are named {tool.name!r}.", param=f"tools.{i}.function.name")
        names.add(tool.name)
        param = f"tools.{i}.function.parameters"
        kind = tool.parameters.get("type", "object") if isinstance(tool.parameters, Mapping) else None
        if kind != "object" and not (isinstance(kind, list) and "object" in kind):
            raise InvalidRequest(f"The parameters of tool {tool.name!r} must be a schema of an object.", param=param)
        check_schema(tool.parameters, param)
    if choice.mode in ("required", "named") and not tools:
        raise InvalidRequest("tool_choice asks for a tool call, but there are no tools.", param="tool_choice")
    if choice.mode == "named" and choice.name not in names:
        raise InvalidRequest(f"tool_choice names {choice.name!r}, which is not among the tools.", param="tool_choice")
    if choice.mode not in ("none", "auto", "required", "named"):
        raise InvalidRequest(f"tool_choice cannot be {choice.mode!r}.", param="tool_choice")


def check_schema(schema: Any, param: str) -> None:
    """Bounds that keep a hostile schema from costing more than a look."""
    if schema is None:
        return
    if isinstance(schema, str):
        if len(schema) > MAX_SCHEMA_CHARACTERS:
            raise InvalidRequest(f"A grammar has at most {MAX_SCHEMA_CHARACTERS} characters.", param=param)
        return
    if _depth_exceeds(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(f"The schema is nested deeper than {MAX_SCHEMA_DEPTH} levels.", param=param)
    try:
        size = len(json.dumps(schema, default=_refuse))
    except (TypeError, ValueError):
        raise InvalidRequest("The schema is not JSON.", param=param) from None
    if size > MAX_SCHEMA_CHARACTERS:
        raise InvalidRequest(
            f"The schema has {size} characters; at most {MAX_SCHEMA_CHARACTERS} are accepted.", param=param
        )


def _refuse(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError


def _depth_exceeds(value: Any, limit: int) -> bool:
    level: list[Any] = [value]
    for _ in range(limit + 1):
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        if not level:
            return False
    return True
