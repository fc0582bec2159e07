"""Prompts of agents, made steady: what changes from request to request without a meaning is left out, so that each
request's prompt extends the one before, and the prefix cache has it.

Agents put a billing line in front of their system text and a count of the tokens that are left behind every turn; both
differ in each request, and all that follows them would be computed anew. Each of these rules can be switched off
(docs/agents.md). Pure; what a template can take is `fitting.py`'s business.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from vllm_mlx.generation.fitting import as_user
from vllm_mlx.generation.request import ChatMessage, GenerationRequest, Part, TextPart

if TYPE_CHECKING:
    from vllm_mlx.settings import AgentSettings

_BILLING_LINE = re.compile(r"\A\s*x-anthropic-billing-header:[^\n]*\n?")
_COUNT = (
    r"[Tt]oken usage: [\d,]+/[\d,]+; [\d,]+ remaining|[\d,]+ tokens (?:left|remaining)"
    r"|USD budget: \$[\d.,]+/\$[\d.,]+; \$[\d.,]+ remaining"
)
_TAGS = "system-reminder|system_warning|system-warning|total_tokens"
# A counter in its tags with the line breaks in front of it; a text of nothing but those; a counter without tags.
_TAGGED_COUNT = re.compile(rf"\n*<({_TAGS})>\s*(?:{_COUNT})\s*</\1>")
_ONLY_TAGGED = re.compile(rf"\s*(?:<(?:{_TAGS})>\s*(?:{_COUNT})\s*</(?:{_TAGS})>\s*)+\Z")
_ONLY_BARE = re.compile(rf"\s*(?:{_COUNT})\s*\Z")


def steady(request: GenerationRequest, settings: AgentSettings) -> GenerationRequest:
    """The request as its prompt is built. A conversation that would be left with nothing to say stays as it is."""
    if request.prompt is not None:
        return request
    messages = request.messages
    if settings.strip_volatile:
        messages = without_volatile(messages) or messages
    if settings.system_turns != "in-place":
        messages = _move_systems(messages, to_front=settings.system_turns == "front")
    reasoning = request.reasoning
    if reasoning.keep_earlier is None:
        # Agents send reasoning back and go on from it; in a plain chat the template's own way is what it was made for.
        keeps = settings.keep_reasoning == "always" or (settings.keep_reasoning == "auto" and bool(request.tools))
        reasoning = replace(reasoning, keep_earlier=keeps)
    elif settings.keep_reasoning == "template":
        reasoning = replace(reasoning, keep_earlier=False)
    tools = request.tools
    if settings.sort_tools:
        tools = tuple(sorted(tools, key=lambda tool: tool.name))
    return replace(request, messages=messages, reasoning=reasoning, tools=tools)


def without_volatile(messages: tuple[ChatMessage, ...]) -> tuple[ChatMessage, ...]:
    """The messages without billing lines and pure counters.

    In system turns a counter is left out wherever it stands in its tags, and without them if it is all there is. In
    what people and tools say it must stand in its tags and be a whole part: a file may well hold such a line.
    """
    kept: list[ChatMessage] = []
    is_front = True
    for message in messages:
        is_front = is_front and message.role == "system"
        parts = tuple(_without_counts(message))
        if is_front and parts and isinstance(parts[0], TextPart):
            first = _BILLING_LINE.sub("", parts[0].text)
            parts = (TextPart(first), *parts[1:]) if first else parts[1:]
        if parts or not message.parts:
            kept.append(message if parts == message.parts else replace(message, parts=parts))
        elif message.role not in ("system", "user"):
            kept.append(replace(message, parts=()))  # a result or an answer stays, however little it says
    return tuple(kept) if any(m.role != "system" for m in kept) else ()


def _without_counts(message: ChatMessage) -> Iterable[Part]:
    for part in message.parts:
        if not isinstance(part, TextPart) or message.role == "assistant":
            yield part
        elif _ONLY_TAGGED.match(part.text) or (message.role == "system" and _ONLY_BARE.match(part.text)):
            continue
        elif message.role == "system" and (text := _TAGGED_COUNT.sub("", part.text)) != part.text:
            if text.strip():
                yield TextPart(text)
        else:
            yield part


def _move_systems(messages: tuple[ChatMessage, ...], *, to_front: bool) -> tuple[ChatMessage, ...]:
    """Later system turns to the front, or (in place) as user turns that say what they are."""
    num_leading = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    leading, rest = messages[:num_leading], messages[num_leading:]
    if not to_front:
        return leading + tuple(as_user(m) if m.role == "system" else m for m in rest)
    later = tuple(m for m in rest if m.role == "system")
    return leading + later + tuple(m for m in rest if m.role != "system")
