"""What a generation says: parser events, then exactly one `Finished`. `collect` folds them into one message."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.parsers.events import (
    ParserNote,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """One token's log-probability with its text; `top` are (token text, bytes, logprob, token id) alternatives."""

    token: str
    token_bytes: bytes
    token_id: int
    logprob: float
    top: tuple[tuple[str, bytes, float, int], ...] = ()


@dataclass(frozen=True, slots=True)
class LogprobsDelta:
    """Log-probabilities of the tokens behind the next text; only when asked for.

    With `is_prompt` they are the prompt's: one entry for each token but the first, before any text.
    """

    entries: tuple[LogprobEntry, ...]
    is_prompt: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """First event of every stream: the prompt is built and on its way to the engine. Says what it turned out to be."""

    request_id: str
    num_prompt_tokens: int
    prompt_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class KeepAlive:
    """Nothing to show yet: the request waits or its prompt is being computed. Protocols render a comment or a ping."""

    phase: str
    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    queue_position: int | None = None
    predicted_wait_s: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationUsage:
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """Last event of every stream.

    `reason`: stop, length, tool_calls, repetition, cancelled, deadline or error. `stop_sequence` is the stop string or
    token text that ended it. `is_cut`: it ended within a document or a call, which must not pass for a whole one.
    `diagnostics` holds what `include_diagnostics` shows; `error` a sentence.
    """

    reason: str
    usage: GenerationUsage
    stop_sequence: str | None = None
    detail: str | None = None
    error: str | None = None
    is_cut: bool = False
    diagnostics: dict[str, Any] = field(default_factory=dict)


OutputEvent = (
    Accepted
    | KeepAlive
    | TextDelta
    | ReasoningDelta
    | ToolCallStarted
    | ToolCallDelta
    | ToolCallEnded
    | LogprobsDelta
    | ParserNote
    | Finished
)


@dataclass(slots=True)
class CollectedToolCall:
    name: str
    arguments: str = ""
    id: str | None = None


@dataclass(slots=True)
class Message:
    """A whole answer."""

    text: str = ""
    reasoning: str = ""
    tool_calls: list[CollectedToolCall] = field(default_factory=list)
    logprobs: list[LogprobEntry] = field(default_factory=list)
    prompt_logprobs: list[LogprobEntry] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    accepted: Accepted | None = None
    finished: Finished | None = None


async def collect(events: AsyncIterator[OutputEvent]) -> Message:
    """Fold a stream into one message; streaming and non-streaming answers come from the same events."""
    message = Message()
    text: list[str] = []
    reasoning: list[str] = []
    async for event in events:
        match event:
            case TextDelta():
                text.append(event.text)
            case ReasoningDelta():
                reasoning.append(event.text)
            case ToolCallStarted():
                message.tool_calls.append(CollectedToolCall(event.name, id=event.id))
            case ToolCallDelta():
                message.tool_calls[event.index].arguments += event.arguments
            case LogprobsDelta():
                (message.prompt_logprobs if event.is_prompt else message.logprobs).extend(event.entries)
            case ParserNote():
                message.notes.append(event.reason)
            case Accepted():
                message.accepted = event
            case Finished():
                message.finished = event
    message.text = "".join(text)
    message.reasoning = "".join(reasoning)
    return message
