"""Anthropic wire types → `GenerationRequest`. Pure: decides what a field means, and which values are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from vllm_mlx.api.anthropic import schemas as wire
from vllm_mlx.api.fields import sampling_overrides, treatment
from vllm_mlx.api.params import invalid, missing, refuse
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import (
    ChatMessage,
    GenerationRequest,
    MediaPart,
    OutputFormat,
    Part,
    ReasoningOptions,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)


def prompt_request(body: wire.PromptFields, *, id: str, **rest: Any) -> GenerationRequest:
    """The part of a request that decides its prompt; all there is for counting tokens."""
    if body.mcp_servers:
        raise refuse("mcp_servers", "MCP servers named in a request are not contacted.")
    if body.container is not None:
        raise refuse("container", "containers are not supported.")
    tools, choice, is_parallel = _tools_of(body)
    template_kwargs = dict(body.chat_template_kwargs or {})
    return GenerationRequest(
        id=id,
        messages=messages_of(body),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=is_parallel,
        output_format=_output_format(body.output_config),
        reasoning=_reasoning(body),
        template_kwargs=template_kwargs,
        # A conversation that ends with the assistant's words asks for their continuation.
        continue_final_message=bool(body.messages) and body.messages[-1].role == "assistant",
        **rest,
    )


def messages_request(body: wire.MessagesRequest, *, id: str, **rest: Any) -> GenerationRequest:
    """The whole request."""
    stops = tuple(body.stop_sequences or ())
    if any(not stop.strip() for stop in stops):
        raise invalid("stop_sequences", "a stop sequence must not be blank.")
    return prompt_request(
        body,
        id=id,
        sampling=sampling_overrides(body),
        max_tokens=body.max_tokens,
        # The field is required, so clients send a number that suits a large model; it means "at most".
        clamp_max_tokens=True,
        stop=stops,
        **treatment(body),
        **rest,
    )


# --- messages ------------------------------------------------------------------------------------------------------


def messages_of(body: wire.PromptFields) -> tuple[ChatMessage, ...]:
    if not body.messages:
        raise invalid("messages", "'messages' must have at least one message.")
    turns = [ChatMessage("system", system)] if (system := _system_parts(body.system)) else []
    call_ids: set[str] = set()
    for i, message in enumerate(body.messages):
        for j, block in enumerate(message.content if not isinstance(message.content, str) else ()):
            if isinstance(block, wire.ToolUseBlock):
                call_ids.add(block.id)
            elif isinstance(block, wire.ToolResultBlock) and block.tool_use_id not in call_ids:
                raise invalid(
                    f"messages.{i}.content.{j}.tool_use_id",
                    f"no earlier 'tool_use' block has the id '{block.tool_use_id}' that this result names.",
                )
        turns.extend(_turns_of(message, f"messages.{i}"))
    return tuple(turns)


def _system_parts(system: str | list[wire.TextBlock] | None) -> tuple[TextPart, ...]:
    texts = [system] if isinstance(system, str) else [block.text for block in system or ()]
    return tuple(TextPart(text) for text in texts if text)


def _turns_of(message: wire.Message, path: str) -> list[ChatMessage]:
    """One message, or several: each tool result becomes a turn of its own, in its place."""
    if isinstance(message.content, str):
        return [ChatMessage(message.role, (TextPart(message.content),) if message.content else ())]
    if message.role == "assistant":
        return [_assistant_turn(message.content, path)]
    turns: list[ChatMessage] = []
    parts: list[Part] = []
    for i, block in enumerate(message.content):
        here = f"{path}.content.{i}"
        if isinstance(block, wire.ToolResultBlock) and message.role == "user":
            if parts:
                turns.append(ChatMessage(message.role, tuple(parts)))
                parts = []
            turns.append(_tool_turn(block, here))
        elif isinstance(block, wire.HostedBlock):
            continue  # Nothing that this model could read.
        elif isinstance(block, _SAID):
            if message.role == "system" and not isinstance(block, (wire.TextBlock, wire.ImageBlock)):
                raise _misplaced(block, message.role, here)
            parts.extend(_parts_of(block, here))
        else:
            raise _misplaced(block, message.role, here)
    if parts or not turns:
        turns.append(ChatMessage(message.role, tuple(parts)))
    return turns


def _assistant_turn(blocks: Sequence[wire.Block], path: str) -> ChatMessage:
    parts: list[Part] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for i, block in enumerate(blocks):
        match block:
            case wire.TextBlock():
                parts.append(TextPart(block.text))
            case wire.ThinkingBlock():
                reasoning.append(block.thinking)
            case wire.RedactedThinkingBlock() | wire.HostedBlock():
                pass  # Nobody but its author could read it.
            case wire.ToolUseBlock():
                calls.append(ToolCall(block.id, block.name, orjson.dumps(block.input).decode()))
            case _:
                raise _misplaced(block, "assistant", f"{path}.content.{i}")
    return ChatMessage("assistant", tuple(parts), reasoning="\n".join(reasoning) or None, tool_calls=tuple(calls))


def _tool_turn(block: wire.ToolResultBlock, path: str) -> ChatMessage:
    parts: list[Part] = []
    if isinstance(block.content, str):
        parts = [TextPart(block.content)]
    else:
        for i, item in enumerate(block.content or ()):
            parts.extend(_parts_of(item, f"{path}.content.{i}"))
    if block.is_error:
        # The flag has no place in a chat template; the model must still learn that the call failed.
        parts = [TextPart("Error: "), *parts]
    return ChatMessage("tool", tuple(parts), tool_call_id=block.tool_use_id)


Said = wire.TextBlock | wire.ImageBlock | wire.DocumentBlock | wire.SearchResultBlock | wire.ToolReferenceBlock
_SAID = (wire.TextBlock, wire.ImageBlock, wire.DocumentBlock, wire.SearchResultBlock, wire.ToolReferenceBlock)


def _parts_of(block: Said, path: str) -> list[Part]:
    match block:
        case wire.TextBlock():
            return [TextPart(block.text)]
        case wire.ImageBlock():
            source = block.source
            if isinstance(source, wire.UrlSource):
                return [MediaPart("image", source.url, f"{path}.source.url")]
            return [MediaPart("image", f"data:{source.media_type};base64,{source.data}", f"{path}.source.data")]
        case wire.DocumentBlock():
            return [TextPart(_document_text(block))]
        case wire.SearchResultBlock():
            text = "\n".join(item.text for item in block.content)
            return [TextPart(f"{block.title} ({block.source})\n{text}")]
        case wire.ToolReferenceBlock():
            return [TextPart(block.tool_name)]


def _document_text(block: wire.DocumentBlock) -> str:
    source = block.source
    if isinstance(source, wire.TextSource):
        text = source.data
    elif isinstance(source.content, str):
        text = source.content
    else:
        text = "\n".join(item.text for item in source.content)
    return "\n".join(part for part in (block.title, block.context, text) if part)


def _misplaced(block: Any, role: str, path: str) -> InvalidRequest:
    return invalid(path, f"a block of type '{block.type}' cannot stand in a message of role '{role}'.")


# --- tools, thinking, formats --------------------------------------------------------------------------------------


def _tools_of(body: wire.PromptFields) -> tuple[tuple[Tool, ...], ToolChoice, bool]:
    """Tools, the choice among them, and whether several may be called at once."""
    tools: list[Tool] = []
    for i, tool in enumerate(body.tools or ()):
        if tool.type not in (None, "custom"):
            raise refuse(
                f"tools.{i}.type", f"'{tool.type}' runs at Anthropic; define the tool with an 'input_schema'."
            )
        if tool.input_schema is None:
            raise missing(f"tools.{i}.input_schema")
        if any(tool.name == other.name for other in tools):
            raise invalid(f"tools.{i}.name", f"two tools are named '{tool.name}'.")
        tools.append(Tool(tool.name, tool.description or "", tool.input_schema, bool(tool.strict)))
    choice = body.tool_choice
    if choice is None:
        return tuple(tools), ToolChoice(), True
    is_parallel = not choice.disable_parallel_tool_use
    match choice.type:
        case "tool":
            if not any(tool.name == choice.name for tool in tools):
                raise invalid("tool_choice.name", f"there is no tool named '{choice.name}' in 'tools'.")
            return tuple(tools), ToolChoice("named", choice.name), is_parallel
        case "any":
            if not tools:
                raise invalid("tool_choice", "'tool_choice' requires a tool, but 'tools' is empty.")
            return tuple(tools), ToolChoice("required"), is_parallel
        case mode:
            return tuple(tools), ToolChoice(mode), is_parallel


def _reasoning(body: wire.PromptFields) -> ReasoningOptions:
    """Without `thinking`, and when it is adaptive, the model's own template decides."""
    thinking = body.thinking
    enabled = body.enable_thinking
    if enabled is None and thinking is not None and thinking.type != "adaptive":
        enabled = thinking.type == "enabled"
    return ReasoningOptions(
        enabled=enabled,
        effort=body.output_config.effort if body.output_config else None,
        max_tokens=thinking.budget_tokens if thinking else None,
        keep_earlier=_keeps_thinking(body.context_management),
    )


def _keeps_thinking(management: wire.ContextManagement | None) -> bool | None:
    """Whether the client asks for the thinking of earlier turns; other edits of the context are not made here."""
    for edit in (management.edits if management else None) or ():
        if edit.type.startswith("clear_thinking") and edit.keep is not None:
            num_turns = edit.keep.get("value") if isinstance(edit.keep, dict) else None
            return edit.keep == "all" or (isinstance(num_turns, int) and num_turns > 1)
    return None


def _output_format(config: wire.OutputConfig | None) -> OutputFormat | None:
    if config is None or config.format is None:
        return None
    return OutputFormat("json_schema", config.format.json_schema, param="output_config.format.schema")
