"""Every format, on what its models write: the meaning is right, and where the text is cut makes no difference."""

from __future__ import annotations

import random

import pytest

from tests.parsers.transcripts import Case, Said, load, parse

CASES = load()
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@each_case
def test_transcript_means_what_its_file_says(case: Case) -> None:
    said = Said.of(parse(case.parser(), [case.text]))
    assert said.calls == case.expect.get("calls", [])
    assert said.text == case.expect.get("text", "")
    assert said.reasoning == case.expect.get("reasoning", "")


@each_case
def test_transcript_cut_anywhere_gives_the_same_events(case: Case) -> None:
    whole = parse(case.parser(), [case.text])
    for i in range(1, len(case.text)):
        assert parse(case.parser(), [case.text[:i], case.text[i:]]) == whole, f"cut before {case.text[i:]!r}"


@each_case
def test_transcript_one_character_at_a_time_and_at_random_gives_the_same_events(case: Case) -> None:
    whole = parse(case.parser(), [case.text])
    assert parse(case.parser(), case.text) == whole
    for seed in range(10):
        cuts = sorted(random.Random(seed).choices(range(len(case.text) + 1), k=1 + len(case.text) // 5))
        pieces = [case.text[i:j] for i, j in zip([0, *cuts], [*cuts, len(case.text)], strict=True)]
        assert parse(case.parser(), pieces) == whole, f"pieces {pieces}"


@each_case
def test_transcript_cut_short_anywhere_still_ends_legally(case: Case) -> None:
    for i in range(len(case.text)):
        Said.of(parse(case.parser(), [case.text[:i]]))
