from hypothesis import given
from hypothesis import strategies as st

from vllm_mlx.generation.stops import StopMatcher

SMALL = st.text(alphabet="abé", max_size=14)


def run(stops, pieces, include_stop=False):
    matcher = StopMatcher(stops, include_stop=include_stop)
    shown = ""
    for piece in pieces:
        match = matcher.feed(piece)
        shown += match.text
        if match.stop is not None:
            return shown, match.stop, match.end
    return shown + matcher.flush(), None, None


def reference(stops, text, include_stop=False):
    """The plain definition: read one character more each time until a stop string stands at the end."""
    for end in range(1, len(text) + 1):
        found = [s for s in stops if s and text[:end].endswith(s)]
        if found:
            stop = max(found, key=len)
            return text[: end if include_stop else end - len(stop)], stop, end
    return text, None, None


@given(st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=4), SMALL, st.booleans())
def test_every_split_gives_what_the_definition_gives(stops, text, include_stop):
    wanted = reference(stops, text, include_stop)
    for cut in range(len(text) + 1):
        assert run(stops, [text[:cut], text[cut:]], include_stop) == wanted
    assert run(stops, list(text), include_stop) == wanted


def test_text_that_may_begin_a_stop_string_is_never_shown_early():
    matcher = StopMatcher(["</answer>"])
    assert matcher.feed("yes</ans").text == "yes"
    assert matcher.held == "</ans"
    assert matcher.feed("wers").text == "</answers"


def test_without_stop_strings_nothing_is_held_back():
    matcher = StopMatcher([])
    assert matcher.feed("abc").text == "abc"
    assert matcher.flush() == ""


def test_empty_stop_strings_never_match():
    assert run([""], ["abc"]) == ("abc", None, None)


def test_the_match_that_ends_first_wins_and_of_those_the_longest():
    assert run(["bc", "abcd"], ["xabcd"]) == ("xa", "bc", 4)
    assert run(["c", "bc"], ["abcd"]) == ("a", "bc", 3)
