"""Reading methods decide as early as they can and never earlier."""

from __future__ import annotations

import pytest

from vllm_mlx.parsers.events import ParserEvent, ReasoningDelta, TextDelta, ToolCallDelta
from vllm_mlx.parsers.machine import Machine, Markers, Steps, coalesce


class Splitter(Machine):
    """Text, with markers shown as `<marker>` events of their own."""

    def __init__(self, *markers: str, trim: bool = False) -> None:
        super().__init__()
        self._markers = Markers(markers)
        self._trim = trim

    def run(self) -> Steps[None]:
        while True:
            found = yield from self.until(self._markers, lambda text: self.emit(TextDelta(text)), trim=self._trim)
            if found is None:
                return
            self.note(found)


def texts(events: list[ParserEvent]) -> list[str]:
    return [event.text if isinstance(event, TextDelta) else event.reason for event in events]  # type: ignore[union-attr]


def test_only_text_that_could_become_a_marker_is_held_back() -> None:
    splitter = Splitter("<tool>", "</tool>")
    assert texts(splitter.feed("a < b <")) == ["a < b "]
    assert texts(splitter.feed("too")) == []
    assert texts(splitter.feed("k")) == ["<took"]
    assert texts(splitter.feed("</tool")) == []
    assert texts(splitter.feed(">x")) == ["</tool>", "x"]


def test_held_back_text_is_given_at_the_end() -> None:
    splitter = Splitter("<tool>")
    splitter.feed("a<to")
    assert texts(splitter.finish()) == ["<to"]
    assert splitter.finish() == []
    assert splitter.feed("more") == []


def test_of_two_markers_at_one_place_the_longer_wins() -> None:
    splitter = Splitter("<a>", "<a><b>")
    assert texts(splitter.feed("<a>")) == []
    assert texts(splitter.feed("<b>")) == ["<a><b>"]
    assert texts(splitter.feed("<a>x")) == ["<a>", "x"]
    assert texts(splitter.feed("<a>")) == []
    assert texts(splitter.finish()) == ["<a>"]


def test_the_leftmost_marker_wins_even_when_another_is_complete_first() -> None:
    splitter = Splitter("xaby", "ab")
    assert texts(splitter.feed("xab")) == []
    assert texts(splitter.feed("y")) == ["xaby"]
    assert texts(splitter.feed("xab")) == []
    assert texts(splitter.feed("z")) == ["x", "ab", "z"]


def test_space_before_a_marker_is_trimmed_and_other_space_is_kept() -> None:
    splitter = Splitter("<t>", trim=True)
    assert texts(splitter.feed("a \n")) == ["a"]
    assert texts(splitter.feed("b \n<t> c ")) == [" \nb", "<t>", " c"]
    assert texts(splitter.finish()) == [" "]


def test_a_long_stream_is_not_kept_in_memory() -> None:
    splitter = Splitter("<t>")
    for _ in range(200):
        splitter.feed("x" * 1000)
    assert len(splitter._buffer) < 20_000


@pytest.mark.parametrize("markers", [(), ("",)])
def test_no_markers_hold_nothing_back(markers: tuple[str, ...]) -> None:
    splitter = Splitter(*markers)
    assert texts(splitter.feed("<abc")) == ["<abc"]


def test_coalesce_joins_neighbours_of_one_kind() -> None:
    events = [
        TextDelta("a"),
        TextDelta("b"),
        ReasoningDelta("c"),
        ToolCallDelta(0, "1"),
        ToolCallDelta(0, "2"),
        ToolCallDelta(1, "3"),
        TextDelta("d"),
    ]
    assert coalesce(events) == [
        TextDelta("ab"),
        ReasoningDelta("c"),
        ToolCallDelta(0, "12"),
        ToolCallDelta(1, "3"),
        TextDelta("d"),
    ]
