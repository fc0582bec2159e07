"""Messages into a shape that a template can take. Nothing is dropped, and nothing moves past another turn. Pure.

as sent  →  leading system turns merged  →  later ones re-roled to user turns, in their place
         →  the first system turn joined to the first user turn  →  neighbours of one role merged
         →  tools described, calls and results written as text
         →  several calls of one turn dealt out to several turns, each before its result
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from vllm_mlx.generation.request import ChatMessage, MediaPart, TextPart, Tool, ToolCall
from vllm_mlx.generation.traits import Traits
from vllm_mlx.parsers.tool_parser import Envelope

_NINE = re.compile(r"[A-Za-z0-9]{9}")


def fit(
    messages: Sequence[ChatMessage], tools: Sequence[Tool], traits: Traits, envelope: Envelope
) -> list[ChatMessage]:
    """`envelope`: how calls are written as text, for templates without tools or tool turns."""
    fitted = list(messages)
    if tools and not traits.takes_tools:
        fitted = describe_tools(fitted, tools, envelope)
    if not traits.takes_tool_turns:
        fitted = [_tool_turn_as_text(m, envelope) for m in fitted]
    else:
        if not traits.takes_parallel_calls:
            fitted = _deal_out_calls(fitted)
        if traits.call_ids == "nine":
            fitted = [_with_short_ids(m) for m in fitted]
    fitted = _fit_system_turns(fitted, traits)
    if traits.takes_tool_turns and not traits.takes_user_after_tool:
        fitted = _join_users_to_results(fitted)
    return fitted if traits.takes_same_role_twice else _merge_neighbours(fitted)


def tool_schema(tool: Tool) -> dict[str, Any]:
    """A tool as templates know it: OpenAI's function object."""
    parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def merged_parts(message: ChatMessage) -> list[TextPart | MediaPart]:
    """Neighbouring text parts become one, so that a string and the same text in blocks render alike."""
    parts: list[TextPart | MediaPart] = []
    for part in message.parts:
        if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(_join(parts[-1].text, part.text))
        else:
            parts.append(part)
    return parts


def _join(first: str, second: str) -> str:
    """Two blocks are two paragraphs, unless one of them brings its own white space (or is empty)."""
    glued = not first or not second or first[-1].isspace() or second[0].isspace()
    return first + second if glued else f"{first}\n{second}"


# ── system turns, neighbours ────────────────────────────────────────────────────────────────────────────────────────


def _fit_system_turns(messages: list[ChatMessage], traits: Traits) -> list[ChatMessage]:
    num_leading = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    leading, rest = messages[:num_leading], messages[num_leading:]
    if len(leading) > 1 and not traits.takes_leading_systems:
        leading = [_merge(leading)]
    if not traits.takes_later_systems:
        rest = [as_user(m) if m.role == "system" else m for m in rest]
    if leading and not traits.takes_system:
        system = _merge(leading)
        if rest and rest[0].role == "user":
            rest[0] = _merge([replace(system, role="user"), rest[0]])
        else:
            rest.insert(0, replace(system, role="user"))
        leading = []
    return leading + rest


def as_user(message: ChatMessage) -> ChatMessage:
    """A system turn where the template takes none: the same words in the same place, marked as what they are."""
    parts = (TextPart("<system-reminder>\n"), *message.parts, TextPart("\n</system-reminder>"))
    return replace(message, role="user", parts=parts)


def _merge(messages: Sequence[ChatMessage]) -> ChatMessage:
    parts: list[TextPart | MediaPart] = []
    for message in messages:
        if parts and message.parts:
            parts.append(TextPart("\n\n"))
        parts.extend(message.parts)
    calls = tuple(call for m in messages for call in m.tool_calls)
    return replace(messages[0], parts=tuple(parts), tool_calls=calls)


def _merge_neighbours(messages: list[ChatMessage]) -> list[ChatMessage]:
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and message.role == merged[-1].role and message.role in ("user", "assistant"):
            merged[-1] = _merge([merged[-1], message])
        else:
            merged.append(message)
    return merged


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def write_calls(calls: Sequence[tuple[str, str]], envelope: Envelope) -> str:
    """Calls (name, arguments as JSON) as the model would write them."""
    written = []
    for number, (name, arguments) in enumerate(calls):
        counted = f":{number}" if envelope.is_counted else ""
        written.append(f"{envelope.begin}{name}{counted}{envelope.middle}{arguments or '{}'}{envelope.end}")
    return envelope.open + envelope.separator.join(written) + envelope.close


def describe_tools(messages: Sequence[ChatMessage], tools: Sequence[Tool], envelope: Envelope) -> list[ChatMessage]:
    """The tools in the system turn, for templates that know none."""
    listing = "\n".join(json.dumps(tool_schema(t), ensure_ascii=False) for t in tools)
    example = write_calls([("<function name>", "<arguments as a JSON object>")], envelope)
    text = (
        f"# Tools\n\nYou may call one or more functions. Their signatures:\n<tools>\n{listing}\n</tools>\n\n"
        f"To call a function, write:\n{example}"
    )
    described = ChatMessage("system", (TextPart(text),))
    if messages and messages[0].role == "system":
        return [_merge([messages[0], described]), *messages[1:]]
    return [described, *messages]


def _tool_turn_as_text(message: ChatMessage, envelope: Envelope) -> ChatMessage:
    if message.role == "tool":
        parts = (TextPart("<tool_response>\n"), *message.parts, TextPart("\n</tool_response>"))
        return replace(message, role="user", parts=parts, tool_call_id=None, name=None)
    if message.tool_calls:
        calls = write_calls([(c.name, c.arguments) for c in message.tool_calls], envelope)
        return replace(message, parts=(*message.parts, TextPart(calls)), tool_calls=())
    return message


def _deal_out_calls(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """A turn with several calls becomes a turn for each, followed by its result."""
    dealt: list[ChatMessage] = []
    position = 0
    while position < len(messages):
        message = messages[position]
        position += 1
        if len(message.tool_calls) < 2:
            dealt.append(message)
            continue
        results: list[ChatMessage] = []
        while position < len(messages) and messages[position].role == "tool":
            results.append(messages[position])
            position += 1
        for number, call in enumerate(message.tool_calls):
            turn = message if number == 0 else replace(message, parts=(), reasoning=None)
            dealt.append(replace(turn, tool_calls=(call,)))
            dealt += [r for r in results if r.tool_call_id == call.id]
        known = {call.id for call in message.tool_calls}
        dealt += [r for r in results if r.tool_call_id not in known]
    return dealt


def _with_short_ids(message: ChatMessage) -> ChatMessage:
    calls = tuple(ToolCall(_nine(c.id), c.name, c.arguments) for c in message.tool_calls)
    answered = _nine(message.tool_call_id) if message.tool_call_id is not None else None
    return replace(message, tool_calls=calls, tool_call_id=answered)


def _nine(call_id: str) -> str:
    return call_id if _NINE.fullmatch(call_id) else hashlib.sha256(call_id.encode()).hexdigest()[:9]


def _join_users_to_results(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """What the user says right behind a result, where the template wants an answer in between: it joins the result."""
    joined: list[ChatMessage] = []
    for message in messages:
        if joined and message.role == "user" and joined[-1].role == "tool":
            joined[-1] = _merge([joined[-1], message])
        else:
            joined.append(message)
    return joined
