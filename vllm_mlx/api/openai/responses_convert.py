"""Responses wire types → `GenerationRequest`. Pure: decides what a field means, and which values are refused.

What an agent sends to every server and cannot change here (hosted tools, verbosity) is ignored with a note in the
answer; what would change the answer otherwise is refused with a 400 that names it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from vllm_mlx.api.fields import asks_to_think, sampling_overrides, treatment
from vllm_mlx.api.openai import responses_schemas as wire
from vllm_mlx.api.openai.convert import audio_part
from vllm_mlx.api.openai.schemas import AudioPart, RefusalPart
from vllm_mlx.api.params import invalid, missing, refuse
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

CUSTOM_PARAMETERS: Mapping[str, Any] = {
    "type": "object",
    "properties": {"input": {"type": "string"}},
    "required": ["input"],
    "additionalProperties": False,
}
_SEALED = "vllm-mlx:"


@dataclass(frozen=True, slots=True)
class ToolName:
    """What the client calls a tool that the model knows by one flat name."""

    name: str
    namespace: str | None = None
    is_custom: bool = False


@dataclass(frozen=True, slots=True)
class Converted:
    """`tool_paths`: where each of the request's tools stands in the body; `notes`: what was left out."""

    request: GenerationRequest
    names: Mapping[str, ToolName] = field(default_factory=dict)
    tool_paths: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def seal(reasoning: str) -> str:
    """Reasoning as `encrypted_content`: opaque to clients, so that it comes back with the next turn. Not a secret."""
    return _SEALED + base64.b64encode(reasoning.encode()).decode()


def unseal(content: str) -> str:
    """Reasoning sealed here; empty for another server's, which nobody here can read."""
    if not content.startswith(_SEALED):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode()
    except (binascii.Error, ValueError):
        return ""


def prompt_request(
    body: wire.PromptFields, *, id: str, history: Sequence[wire.InputItem] = (), **rest: Any
) -> Converted:
    """The part of a request that decides its prompt; `history` are the items of the responses before it."""
    _refuse_unserved(body)
    tools, names, paths, notes = _tools_of(body.tools or ())
    tools, choice = _choice_of(body.tool_choice, tools, names)
    if body.text and body.text.verbosity not in (None, "medium"):
        notes.append(f"text.verbosity '{body.text.verbosity}' has no effect here; say it in the instructions.")
    if body.truncation == "auto":
        notes.append("truncation 'auto' has no effect here: a conversation that is too long is refused.")
    turns = [ChatMessage("system", (TextPart(body.instructions),))] if body.instructions else []
    said = Conversation(notes)
    said.read(history, "previous_response_id")
    said.read(input_items(body), "input")
    turns += said.turns
    if not turns or (body.input is None and not history):
        raise missing("input")
    request = GenerationRequest(
        id=id,
        messages=tuple(turns),
        tools=tools,
        tool_choice=choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        output_format=_output_format(body.text),
        template_kwargs=dict(body.chat_template_kwargs or {}),
        **{"reasoning": _reasoning(body), **rest},
    )
    return Converted(request, names, paths, tuple(notes))


def responses_request(
    body: wire.ResponsesRequest, *, id: str, history: Sequence[wire.InputItem] = (), **rest: Any
) -> Converted:
    """The whole generation that a body asks for."""
    _refuse_unserved_options(body)
    return prompt_request(
        body,
        id=id,
        history=history,
        sampling=sampling_overrides(body),
        reasoning=replace(_reasoning(body), max_tokens=body.max_thinking_tokens),
        max_tokens=body.max_output_tokens,
        # Agents send a number that suits a large model; it means "at most".
        clamp_max_tokens=body.max_output_tokens is not None,
        **treatment(body),
        **rest,
    )


def _refuse_unserved(body: wire.PromptFields) -> None:
    if body.conversation is not None:
        raise refuse("conversation", "conversations are not kept; use 'previous_response_id' or send the whole input.")
    if body.prompt is not None:
        raise refuse("prompt", "stored prompts are not supported; send 'instructions' and 'input'.")


def _refuse_unserved_options(body: wire.ResponsesRequest) -> None:
    if body.background:
        raise refuse("background", "background responses are not supported; leave 'background' out and stream.")
    if body.service_tier not in (None, "auto", "default"):
        raise refuse("service_tier", "there is one service tier here: 'default'.")
    if body.top_logprobs or "message.output_text.logprobs" in (body.include or ()):
        param = "top_logprobs" if body.top_logprobs else "include"
        raise refuse(param, "log-probabilities are served by /v1/chat/completions only.")
    if body.stream_options and body.stream_options.include_obfuscation:
        raise refuse("stream_options.include_obfuscation", "obfuscation padding is not supported.")


# --- input ---------------------------------------------------------------------------------------------------------


def input_items(body: wire.PromptFields) -> list[wire.InputItem]:
    """The request's own items; a string is one user message."""
    if isinstance(body.input, str):
        return [wire.MessageItem(role="user", content=body.input)] if body.input else []
    return list(body.input or ())


class Conversation:
    """Items → turns: the model's reasoning, words and calls that follow one another are one assistant turn.

    What a tool did at OpenAI in an earlier turn cannot be told to this model; it is left out, with a note.
    """

    def __init__(self, notes: list[str]) -> None:
        self.turns: list[ChatMessage] = []
        self._notes = notes
        self._call_ids: set[str] = set()

    def read(self, items: Sequence[wire.InputItem], path: str) -> None:
        draft = _AssistantDraft()
        for i, item in enumerate(items):
            here = f"{path}.{i}"
            match item:
                case wire.ReasoningItem():
                    if draft.parts or draft.calls:
                        self._flush(draft)
                    draft.reasoning.append(_reasoning_text(item))
                case wire.FunctionCallItem():
                    self._call(draft, item, item.arguments or "{}")
                case wire.CustomCallItem():
                    self._call(draft, item, orjson.dumps({"input": item.input}).decode())
                case wire.MessageItem(role="assistant"):
                    if draft.calls:
                        self._flush(draft)
                    draft.parts.extend(_parts(item.content, f"{here}.content", role="assistant"))
                    draft.is_open = True
                case wire.MessageItem():
                    self._flush(draft)
                    role = "system" if item.role == "developer" else item.role
                    parts = tuple(_parts(item.content, f"{here}.content", role=item.role))
                    self.turns.append(ChatMessage(role, parts))
                case wire.CallOutputItem():
                    self._flush(draft)
                    self._result(item, here)
                case wire.HostedItem():
                    self._notes.append(f"{here}: an item of type '{item.type}' means nothing here and was left out.")
                case wire.ItemReference():
                    raise refuse(
                        here, "item references are not resolved here; send the item, or 'previous_response_id'."
                    )
        self._flush(draft)

    def _call(
        self, draft: _AssistantDraft, item: wire.FunctionCallItem | wire.CustomCallItem, arguments: str
    ) -> None:
        draft.calls.append(ToolCall(item.call_id, flat_name(item.namespace, item.name), arguments))
        self._call_ids.add(item.call_id)

    def _result(self, item: wire.CallOutputItem, here: str) -> None:
        if item.call_id not in self._call_ids:
            raise invalid(f"{here}.call_id", f"no tool call found for the output with call_id '{item.call_id}'.")
        parts = tuple(_parts(item.output, f"{here}.output", role="tool"))
        self.turns.append(ChatMessage("tool", parts, tool_call_id=item.call_id))

    def _flush(self, draft: _AssistantDraft) -> None:
        if (turn := draft.take()) is not None:
            self.turns.append(turn)


@dataclass(slots=True)
class _AssistantDraft:
    """The assistant turn that is being put together."""

    reasoning: list[str] = field(default_factory=list)
    parts: list[Part] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    is_open: bool = False

    def take(self) -> ChatMessage | None:
        """The turn, if there is any, and begin another."""
        reasoning = "\n".join(text for text in self.reasoning if text)
        turn = None
        if self.is_open or reasoning or self.calls:
            turn = ChatMessage(
                "assistant", tuple(self.parts), reasoning=reasoning or None, tool_calls=tuple(self.calls)
            )
        self.reasoning, self.parts, self.calls, self.is_open = [], [], [], False
        return turn


def _reasoning_text(item: wire.ReasoningItem) -> str:
    """The model's own words if they came back in any form; a summary is a poor stand-in but better than nothing."""
    if item.content:
        return "".join(part.text for part in item.content)
    if item.encrypted_content and (text := unseal(item.encrypted_content)):
        return text
    return "\n".join(part.text for part in item.summary or ())


def _parts(content: str | list[wire.ContentPart], path: str, *, role: str) -> list[Part]:
    if isinstance(content, str):
        return [TextPart(content)] if content else []
    parts: list[Part] = []
    for i, part in enumerate(content):
        here = f"{path}.{i}"
        match part:
            case wire.TextPart():
                parts.append(TextPart(part.text))
            case RefusalPart():
                parts.append(TextPart(part.refusal))
            case _ if role == "assistant":
                raise invalid(here, f"a message of role '{role}' can hold text only.")
            case wire.ImagePart(image_url=url) if url:
                options = {"detail": part.detail} if part.detail else {}
                parts.append(MediaPart("image", url, f"{here}.image_url", options))
            case wire.ImagePart():
                if part.file_id is not None:
                    raise refuse(f"{here}.file_id", "files are not kept here; send the picture as 'image_url'.")
                raise missing(f"{here}.image_url")
            case AudioPart():
                parts.append(audio_part(part, here))
    return parts


# --- tools ---------------------------------------------------------------------------------------------------------


def flat_name(namespace: str | None, name: str) -> str:
    """The one name under which the model sees a tool of a namespace."""
    if not namespace:
        return name
    return namespace + name if namespace.endswith("__") else f"{namespace}__{name}"


def _tools_of(
    given: Sequence[wire.Tool],
) -> tuple[tuple[Tool, ...], dict[str, ToolName], tuple[str, ...], list[str]]:
    tools: list[Tool] = []
    paths: list[str] = []
    names: dict[str, ToolName] = {}
    notes: list[str] = []

    def add(tool: wire.FunctionTool | wire.CustomTool, path: str, space: wire.NamespaceTool | None = None) -> None:
        name = flat_name(space.name if space else None, tool.name)
        if name in names:
            raise invalid(f"{path}.name", f"two tools are named '{name}'.")
        names[name] = ToolName(tool.name, space.name if space else None, isinstance(tool, wire.CustomTool))
        tools.append(_tool(tool, name))
        paths.append(path)

    for i, tool in enumerate(given):
        match tool:
            case wire.HostedTool():
                notes.append(f"tools.{i}: '{tool.type}' does not run here and was ignored.")
            case wire.NamespaceTool():
                for j, nested in enumerate(tool.tools):
                    add(nested, f"tools.{i}.tools.{j}", tool)
            case _:
                add(tool, f"tools.{i}")
    return tuple(tools), names, tuple(paths), notes


def _tool(tool: wire.FunctionTool | wire.CustomTool, name: str) -> Tool:
    description = tool.description or ""
    if isinstance(tool, wire.FunctionTool):
        parameters = tool.parameters or {"type": "object", "properties": {}}
        return Tool(name, description, parameters, bool(tool.strict))
    if tool.format and tool.format.definition:
        # The grammar of a free-form input is told to the model, not enforced.
        described = f"The input follows this {tool.format.syntax or ''} grammar:\n{tool.format.definition}"
        description = f"{description}\n{described}" if description else described
    return Tool(name, description, CUSTOM_PARAMETERS)


def _choice_of(
    choice: Any, tools: tuple[Tool, ...], names: Mapping[str, ToolName]
) -> tuple[tuple[Tool, ...], ToolChoice]:
    match choice:
        case wire.NamedToolChoice():
            return tools, ToolChoice("named", _find(choice, names, "tool_choice.name"))
        case wire.AllowedToolChoice():
            allowed = {_find(ref, names, f"tool_choice.tools.{i}.name") for i, ref in enumerate(choice.tools)}
            return tuple(tool for tool in tools if tool.name in allowed), ToolChoice(choice.mode)
        case "required" if not tools:
            raise invalid("tool_choice", "'tool_choice' requires a tool, but 'tools' has none that runs here.")
    return tools, ToolChoice(choice or "auto")


def _find(choice: wire.NamedToolChoice, names: Mapping[str, ToolName], param: str) -> str:
    """The flat name of the tool that is meant; without a namespace, of the only one so named in any."""
    flat = flat_name(choice.namespace, choice.name)
    if flat in names:
        return flat
    found = [name for name, tool in names.items() if tool.name == choice.name and choice.namespace is None]
    if len(found) != 1:
        raise invalid(param, f"there is no one tool named '{choice.name}' in 'tools'.")
    return found[0]


# --- shape and reasoning -------------------------------------------------------------------------------------------


def _output_format(text: wire.TextOptions | None) -> OutputFormat | None:
    given = text.format if text else None
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return OutputFormat("json_object")
    if given.json_schema is None:
        raise missing("text.format.schema")
    return OutputFormat("json_schema", given.json_schema, strict=given.strict is not False)


def _reasoning(body: wire.PromptFields) -> ReasoningOptions:
    enabled = asks_to_think(body)
    effort = body.reasoning.effort if body.reasoning else None
    if effort == "none":
        return ReasoningOptions(enabled=False if enabled is None else enabled)
    return ReasoningOptions(enabled=enabled, effort=effort)
