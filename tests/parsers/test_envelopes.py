"""An envelope says how its format writes calls: what is written by it, the format reads back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parsers.transcripts import TOOLS, Said, parse
from vllm_mlx.parsers import discover
from vllm_mlx.parsers.pipeline import build
from vllm_mlx.parsers.tool_parser import Envelope

FORMATS = sorted({discover.find_tool_format(name).name for name in discover.tool_format_names()} - {"auto"})
CALLS: list[tuple[str, dict[str, Any]]] = [
    ("get_weather", {"city": "Paris", "days": 2}),
    ("search", {"query": "cats", "filters": {"a": [1, {"b": None}]}, "tags": ["x"]}),
    ("now", {}),
]


def write_value(envelope: Envelope, value: Any) -> str:
    match envelope.style, value:
        case "gemma", str():
            return envelope.quote + value + envelope.quote
        case "gemma", dict():
            return "{" + ",".join(f"{k}:{write_value(envelope, v)}" for k, v in value.items()) + "}"
        case "gemma", list():
            return "[" + ",".join(write_value(envelope, v) for v in value) + "]"
        case "tags", str():
            return value
        case "python", _:
            return repr(value)
        case _:
            return json.dumps(value)


def write_arguments(envelope: Envelope, arguments: dict[str, Any]) -> str:
    match envelope.style:
        case "json":
            return json.dumps(arguments)
        case "tags":
            return "".join(
                envelope.parameter_begin
                + key
                + envelope.parameter_middle.replace("{is_string}", "true" if isinstance(value, str) else "false")
                + write_value(envelope, value)
                + envelope.parameter_end
                for key, value in arguments.items()
            )
        case "python":
            return ", ".join(f"{key}={write_value(envelope, value)}" for key, value in arguments.items())
        case "gemma":
            return ",".join(f"{key}:{write_value(envelope, value)}" for key, value in arguments.items())
    raise AssertionError(envelope.style)


def write(envelope: Envelope, calls: list[tuple[str, dict[str, Any]]]) -> str:
    written = [
        envelope.begin
        + name
        + (f":{i}" if envelope.is_counted else "")
        + envelope.middle
        + write_arguments(envelope, arguments)
        + envelope.end
        for i, (name, arguments) in enumerate(calls)
    ]
    return envelope.open + envelope.separator.join(written) + envelope.close


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("calls", [CALLS[:1], CALLS], ids=["one", "several"])
def test_calls_written_by_the_envelope_are_read_back(name: str, calls: list[tuple[str, dict[str, Any]]]) -> None:
    envelope = discover.find_tool_format(name).envelope
    assert envelope is not None
    text = write(envelope, calls)
    events = parse(build(tool_format=name, tools=TOOLS), [text])
    said = Said.of(events)
    assert [(call["name"], call["arguments"]) for call in said.calls] == calls
    assert all(said.completeness)
    assert not said.text.strip()
    assert not said.notes


@pytest.mark.parametrize("name", FORMATS)
def test_triggers_begin_the_envelope_and_open_a_call_for_the_parser(name: str) -> None:
    format = discover.find_tool_format(name)
    assert format.envelope is not None
    opening = (format.envelope.open + format.envelope.begin).lstrip()
    for trigger in format.envelope.triggers:
        assert opening.startswith(trigger)
        assert name == "harmony" or any(opening.startswith(opener) for opener in format.openers)


@pytest.mark.parametrize("name", FORMATS)
def test_special_tokens_of_an_envelope_are_markers_that_are_kept(name: str) -> None:
    parser = build(tool_format=name, tools=TOOLS)
    assert parser.envelope is not None
    for token in parser.envelope.special_tokens:
        assert parser.needs_special_tokens
        assert parser.keeps(token)
