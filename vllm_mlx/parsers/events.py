"""What a parser says about generated text. `generation/events.py` adds the end of the stream."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """The model's visible thinking."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A tool call opens; `index` counts an answer's calls from 0. `id` is set only where the format carries one."""

    index: int
    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call's arguments; all pieces of an index joined are one JSON object."""

    index: int
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCallEnded:
    """The call is over. Not `is_complete`: the text broke off, or was broken, inside the arguments; what was read of
    them was closed to valid JSON, but the model may have meant more."""

    index: int
    is_complete: bool = True


@dataclass(frozen=True, slots=True)
class ParserNote:
    """Something a reader of diagnostics should know: a call that was recovered, or returned as text, and why."""

    reason: str


ParserEvent = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | ToolCallEnded | ParserNote
