"""Markers are found whatever stands around them, also where tokens hold more than the marker."""

from __future__ import annotations

import random

from vllm_mlx.engine.markers import SpelledMarker, TokenMatch, match_of


def spelled(text: str, vocabulary: list[str]) -> SpelledMarker:
    ids = {token: i for i, token in enumerate(vocabulary)}
    rests = tuple(tuple(ids[c] for c in text[k:]) for k in range(len(text) + 1))
    return SpelledMarker(text.encode(), rests[0], lambda i: vocabulary[i].encode(), rests)


def test_a_marker_of_ids_is_found_whatever_stands_before_it() -> None:
    match = match_of((1, 1, 2))
    assert isinstance(match, TokenMatch) and match.num_tokens == 3
    assert [match.feed(t) for t in (1, 1, 1, 2, 1, 2, 1, 1, 2)] == [False, False, False, True] + [False] * 4 + [True]
    assert not match_of(()).feed(1)


def test_what_is_left_of_a_marker_that_has_begun() -> None:
    match = match_of((1, 2, 3))
    assert match.rest() == ()
    match.feed(1)
    assert match.rest() == (2, 3)
    by_text = match_of(spelled("abc", ["a", "b", "c", "xab"]))
    by_text.feed(3)
    assert by_text.rest() == (2,)


def test_a_spelled_marker_is_found_in_tokens_of_any_cut() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        marker = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 4)))
        cuts = sorted(rng.sample(range(1, len(text)), rng.randrange(len(text)))) if len(text) > 1 else []
        tokens = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        match = match_of(spelled(marker, [*"ab", *tokens]))
        found = [match.feed(2 + i) for i in range(len(tokens))]
        assert any(found) == (marker in text)
        if any(found):
            first = found.index(True)
            before = len("".join(tokens[: first + 1 - 1]))
            assert text.index(marker) + len(marker) > before


def test_tokens_that_hold_a_part_of_the_marker_are_counted() -> None:
    vocabulary = ["x", "y.</", "think", ">\n\n", "<", "/"]
    for tokens, num in (([0, 1, 2, 3], 3), ([0, 0, 4, 5, 2, 3], 4)):
        match = match_of(SpelledMarker(b"</think>", (), lambda i: vocabulary[i].encode(), ((),) * 9))
        assert [match.feed(t) for t in tokens][-1] and match.num_tokens == num
