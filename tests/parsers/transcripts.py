"""Reads the transcripts: what models write, in shapes taken from the source each file names, and what it means.

A case: `text` as generated; `expect` with `text`, `reasoning` and `calls` (absent means empty); `reasoning_format` and
`starts_open` where the case needs them. All cases share the tools below.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from vllm_mlx.parsers.events import (
    ParserEvent,
    ParserNote,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from vllm_mlx.parsers.machine import coalesce
from vllm_mlx.parsers.pipeline import OutputParser, build
from vllm_mlx.parsers.schema import ToolSpec

TOOLS = (
    ToolSpec(
        "get_weather",
        {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    ),
    ToolSpec(
        "search",
        {
            "type": "object",
            "properties": {
                "query": {"type": "string"},
                "filters": {"type": "object"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
        },
    ),
    ToolSpec(
        "write_file", {"type": "object", "properties": {"path": {"type": "string"}, "content": {"type": "string"}}}
    ),
    ToolSpec("now", {"type": "object", "properties": {}}),
)


@dataclass(frozen=True)
class Case:
    format: str
    name: str
    text: str
    expect: dict[str, Any]
    reasoning_format: str | None
    starts_open: bool

    def parser(self) -> OutputParser:
        return build(
            tool_format=self.format,
            reasoning_format=self.reasoning_format,
            tools=TOOLS,
            starts_open=self.starts_open,
        )


def load() -> list[Case]:
    cases = []
    for path in sorted((Path(__file__).parent / "transcripts").glob("*.yaml")):
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        for case in document["cases"]:
            cases.append(
                Case(
                    document["format"],
                    f"{path.stem}: {case['name']}",
                    case["text"],
                    case["expect"],
                    case.get("reasoning_format"),
                    case.get("starts_open", False),
                )
            )
    return cases


def parse(parser: OutputParser, pieces: Iterable[str]) -> list[ParserEvent]:
    """All events, neighbouring pieces joined."""
    events: list[ParserEvent] = []
    for piece in pieces:
        events += parser.feed(piece)
    return coalesce([*events, *parser.finish()])


@dataclass
class Said:
    """What events add up to, and that they came in a legal order."""

    text: str = ""
    reasoning: str = ""
    notes: str = ""
    names: list[str] = field(default_factory=list)
    ids: list[str | None] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)
    completeness: list[bool] = field(default_factory=list)

    @classmethod
    def of(cls, events: Iterable[ParserEvent]) -> Said:
        said = cls()
        for event in events:
            match event:
                case TextDelta(text):
                    assert text
                    assert len(said.names) == len(said.completeness), "no text inside a call"
                    said.text += text
                case ReasoningDelta(text):
                    assert text
                    assert len(said.names) == len(said.completeness), "no reasoning inside a call"
                    said.reasoning += text
                case ToolCallStarted(index, name, id):
                    assert index == len(said.names) == len(said.completeness), "one call at a time, numbered in order"
                    said.names.append(name)
                    said.ids.append(id)
                    said.arguments.append("")
                case ToolCallDelta(index, arguments):
                    assert index == len(said.names) - 1 == len(said.completeness), "arguments inside their call"
                    said.arguments[index] += arguments
                case ToolCallEnded(index, is_complete):
                    assert index == len(said.completeness) == len(said.names) - 1, "each call ends once"
                    said.completeness.append(is_complete)
                case ParserNote(reason):
                    said.notes += reason + "\n"
        assert len(said.completeness) == len(said.names), "every call ends"
        for arguments in said.arguments:
            assert isinstance(json.loads(arguments), dict), "arguments joined are a JSON object"
        return said

    @property
    def calls(self) -> list[dict[str, Any]]:
        calls = []
        for name, id, arguments, is_complete in zip(
            self.names, self.ids, self.arguments, self.completeness, strict=True
        ):
            call: dict[str, Any] = {"name": name, "arguments": json.loads(arguments)}
            if id is not None:
                call["id"] = id
            if not is_complete:
                call["is_complete"] = False
            calls.append(call)
        return calls
