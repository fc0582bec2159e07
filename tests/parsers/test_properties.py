"""Any text at all, above all text full of half-broken markup: parsers never raise, lose no word, and do not care where
the text is cut."""

from __future__ import annotations

import re
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parsers.transcripts import TOOLS, Said, load, parse
from vllm_mlx.parsers import discover
from vllm_mlx.parsers.pipeline import build

CASES = load()
TOOL_FORMATS = sorted({discover.find_tool_format(name).name for name in discover.tool_format_names()})
REASONING_FORMATS = sorted({discover.find_reasoning_format(name).name for name in discover.reasoning_format_names()})
# The reasoning a model of the tool format would use; think tags for all others.
PAIRED = {
    "harmony": "harmony",
    "gemma4": "gemma4",
    "mistral": "mistral",
    "kimi": "kimi",
    "kimi_k3": "kimi_k3",
    "command_r": "command_r",
    "granite": "granite",
    "auto": "auto",
}
JSON_PIECES = (
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    ":",
    ",",
    "\\",
    '"name": "',
    '"arguments": {',
    '"parameters": ',
    "true",
    "1",
)
COMMON_PIECES = (
    "\n",
    " ",
    ";",
    "```",
    "<",
    ">",
    "|",
    "(",
    ")",
    "=",
    "get_weather",
    "now",
    "city",
    "é🎉",
    "\\u00e9",
    "\\ud83d",
)


@cache
def transcripts_of(tool_format: str) -> list[str]:
    tool = discover.find_tool_format(tool_format)
    own = [case.text for case in CASES if discover.find_tool_format(case.format) is tool]
    return own or [case.text for case in CASES if type(discover.find_tool_format(case.format)) in type(tool).__mro__]


def in_chunks(text: str) -> list[str]:
    return re.findall(r"\w+|[<\[][^\s<>\[\]]*[>\]]|\W", text)


@st.composite
def generated(draw: st.DrawFn, tool_format: str, reasoning_format: str) -> str:
    """A heap of markup and words, or a transcript with a few of its chunks replaced. Words are w0w, w1w, ..."""
    tool, texts = discover.find_tool_format(tool_format), transcripts_of(tool_format)
    markers = (*tool.openers, *tool.markers, *discover.find_reasoning_format(reasoning_format).texts)
    piece = st.one_of(st.sampled_from((*markers, *JSON_PIECES, *COMMON_PIECES)), st.just("WORD"), st.text(max_size=4))
    if texts and draw(st.booleans()):
        parts = in_chunks(draw(st.sampled_from(texts)))
        for place, size, new in draw(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 1), piece), max_size=5)):
            place %= len(parts) + 1
            parts[place : place + size] = [new]
    else:
        parts = draw(st.lists(piece, max_size=25))
    return "".join(f"w{i}w" if part == "WORD" else part for i, part in enumerate(parts))


def check(tool_format: str | None, reasoning_format: str | None, text: str, cuts: list[int], starts_open: bool) -> None:
    def parser():
        return build(tool_format=tool_format, reasoning_format=reasoning_format, tools=TOOLS, starts_open=starts_open)

    whole = parse(parser(), [text])
    edges = [0, *sorted(c % (len(text) + 1) for c in cuts), len(text)]
    assert parse(parser(), [text[i:j] for i, j in zip(edges, edges[1:], strict=False)]) == whole
    assert parse(parser(), text) == whole
    said = Said.of(whole)
    everything = " ".join((said.text, said.reasoning, said.notes, *said.names, *said.arguments, *map(str, said.ids)))
    for word in re.findall(r"w\d+w", text):
        assert word in everything, f"{word} is lost from {text!r}"


@pytest.mark.parametrize("tool_format", TOOL_FORMATS)
def test_broken_markup_never_raises_and_loses_no_word(tool_format: str) -> None:
    reasoning_format = PAIRED.get(tool_format, "think_tags")

    @settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @given(generated(tool_format, reasoning_format), st.lists(st.integers(0, 500), max_size=4), st.booleans())
    def run(text: str, cuts: list[int], starts_open: bool) -> None:
        check(tool_format, reasoning_format, text, cuts, starts_open)

    run()


@pytest.mark.parametrize("reasoning_format", REASONING_FORMATS)
def test_reasoning_alone_never_raises_and_loses_no_word(reasoning_format: str) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True, database=None)
    @given(generated("hermes", reasoning_format), st.lists(st.integers(0, 500), max_size=4), st.booleans())
    def run(text: str, cuts: list[int], starts_open: bool) -> None:
        check(None, reasoning_format, text, cuts, starts_open)

    run()


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(st.text(), st.lists(st.integers(0, 500), max_size=4))
def test_text_without_markup_passes_unchanged(text: str, cuts: list[int]) -> None:
    said = Said.of(parse(build(tool_format="qwen3_coder", reasoning_format="qwen3", tools=TOOLS), [text]))
    assert said.text == text
    assert not said.calls and not said.reasoning
