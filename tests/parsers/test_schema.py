"""Values written without quotes get the type their schema allows; text that fits none stays text."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vllm_mlx.parsers.schema import ToolSpec, coerce


def types(*names: str) -> frozenset[str]:
    return frozenset(names)


@pytest.mark.parametrize(
    ("text", "allowed", "value"),
    [
        ("42", types("string"), "42"),
        ("42", types("integer"), 42),
        ("42", types("number"), 42),
        ("4.5", types("number"), 4.5),
        ("4.5", types("integer"), "4.5"),
        ("42", types(), 42),
        ("forty", types("integer"), "forty"),
        ("true", types("boolean"), True),
        ("True", types("boolean"), True),
        ("1", types("boolean"), True),
        ("1", types("boolean", "integer"), 1),
        ("null", types("string", "null"), None),
        ("None", types("integer", "null"), None),
        ("null", types("string"), "null"),
        ('{"a": 1}', types("object"), {"a": 1}),
        ("{'a': True}", types("object"), {"a": True}),
        ('{"a": 1}', types("string"), '{"a": 1}'),
        ("[1, 2", types("array"), "[1, 2"),
        ("", types("object"), {}),
        ("", types("array"), []),
        ("", types("string"), ""),
        ('"42"', types("integer"), 42),
        (" spaced ", types("string"), " spaced "),
        (" 7 ", types("integer"), 7),
        ("[1]", types(), [1]),
        ("plain words", types(), "plain words"),
        ("1; drop", types(), "1; drop"),
    ],
)
def test_text_becomes_what_the_schema_allows(text: str, allowed: frozenset[str], value: object) -> None:
    assert json.loads(coerce(text, allowed)) == value


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, {"integer", "null"}),
        ({"anyOf": [{"type": "integer"}, {}]}, set()),
        ({"enum": ["a", "b"]}, {"string"}),
        ({"enum": [1, "b", True]}, {"integer", "string", "boolean"}),
        ({"const": 1.5}, {"number"}),
        ({"$ref": "#/$defs/Point"}, {"object"}),
        ({"$ref": "#/$defs/Loop"}, set()),
        ({"$ref": "#/nowhere"}, set()),
        ({"properties": {}}, {"object"}),
        ({"items": {}}, {"array"}),
        ({}, set()),
        (True, set()),
        ({"type": {"bad": 1}}, set()),
    ],
)
def test_types_are_found_in_the_schema(schema: Any, expected: set[str]) -> None:
    definitions = {"Point": {"type": "object"}, "Loop": {"$ref": "#/$defs/Loop"}}
    tool = ToolSpec("f", {"type": "object", "properties": {"x": schema}, "$defs": definitions})
    assert tool.types_of("x") == expected


@pytest.mark.parametrize("parameters", [{}, {"properties": None}, {"properties": []}, {"type": "object"}])
def test_a_schema_without_properties_says_nothing(parameters: dict[str, Any]) -> None:
    tool = ToolSpec("f", parameters)
    assert tool.types_of("x") == frozenset()
    assert tool.parameter_names == ()
