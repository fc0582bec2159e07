"""Values as models write them become strict JSON, and whatever breaks off can be closed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Machine, Steps
from vllm_mlx.parsers.values import JSON, PYTHON, Dialect, read_value, to_json

GEMMA = Dialect(has_bare_strings=True, quotes=('<|"|>',))


def read(text: str, dialect: Dialect = JSON) -> object:
    document = to_json(text, dialect)
    return None if document is None else json.loads(document)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, -2.5e3, true, null], "b": {}}', {"a": [1, -2500.0, True, None], "b": {}}),
        ("{'a': 'it\\'s', 'b': 'say \"hi\"'}", {"a": "it's", "b": 'say "hi"'}),
        ('{"a": True, "b": False, "c": None}', {"a": True, "b": False, "c": None}),
        ('{"a": NaN, "b": Infinity, "c": undefined}', {"a": None, "b": None, "c": None}),
        ('{"a": 1,}', {"a": 1}),
        ("[1, 2,]", [1, 2]),
        ("{a: 1, b_c: 2}", {"a": 1, "b_c": 2}),
        ('{"a": "line\nbreak\ttab"}', {"a": "line\nbreak\ttab"}),
        (r'{"a": "\d+\|x"}', {"a": r"\d+\|x"}),
        (r'{"a": "\u00e9\ud83c\udf89"}', {"a": "é🎉"}),
        (r'{"a": "\ud83c alone", "b": "\udf89"}', {"a": "\ufffd alone", "b": "\ufffd"}),
        (r'{"a": "\u12"}', {"a": r"\u12"}),
        ('{"a": 0x1F, "b": 1_000, "c": +1, "d": .5}', {"a": 31, "b": 1000, "c": 1, "d": 0.5}),
        ('{"a": ' + "9" * 400 + "}", {"a": "9" * 400}),
    ],
)
def test_lenient_json_is_read(text: str, value: object) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("(1, 'a')", [1, "a"]),
        ("{'a': (1,)}", {"a": [1]}),
        (r"r'\d'", r"\d"),
        (r"'\x41\U0001F600'", "A😀"),
        ('"""a "quoted" word"""', 'a "quoted" word'),
        ("''", ""),
        ('""', ""),
    ],
)
def test_python_literals_are_read(text: str, value: object) -> None:
    assert read(text, PYTHON) == value


def test_gemma_strings_hold_anything() -> None:
    text = '{a:<|"|>x, "y" {z}: \\n<|"|>,b:[<|"|>1<|"|>,2],c:Paris on Sunday,<|"|>d e<|"|>:true}'
    assert read(text, GEMMA) == {"a": 'x, "y" {z}: \\n', "b": ["1", 2], "c": "Paris on Sunday", "d e": True}


@pytest.mark.parametrize(
    "text", ["", "{", '{"a"', '{"a": }', "[1 2]", "1 2", "{1: [}", "word", '"open', "[" * 200 + "]" * 200]
)
def test_what_is_no_value_is_none(text: str) -> None:
    assert to_json(text, JSON) is None


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(json_values, st.booleans(), st.sampled_from([None, 2]))
def test_strict_json_passes_unchanged(value: object, is_ascii: bool, indent: int | None) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii, indent=indent)
    assert read(text) == value
    if indent is None and not is_ascii:
        assert to_json(text, JSON) == text


class Copier(Machine):
    """Copies one value and closes what is left open."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []

    def run(self) -> Steps[None]:
        writer = JsonWriter(self.parts.append)
        try:
            yield from read_value(self, writer)
        except Broken:
            pass
        writer.close()


@settings(max_examples=100, deadline=None, derandomize=True, database=None)
@given(json_values.map(json.dumps), st.data())
def test_a_document_cut_anywhere_is_closed_to_valid_json(text: str, data: st.DataObject) -> None:
    cut = text[: data.draw(st.integers(0, len(text)))]
    copier = Copier()
    for char in cut:
        copier.feed(char)
    copier.finish()
    json.loads("".join(copier.parts))


def test_a_value_is_passed_on_while_it_is_read() -> None:
    copier = Copier()
    copier.feed('{"path": "/a", "content": "hel')
    assert "".join(copier.parts) == '{"path": "/a", "content": "hel'
    copier.feed('lo", "mode')
    assert "".join(copier.parts) == '{"path": "/a", "content": "hello"', "a key waits for its value"
