"""What steers a row from the host: grammar state, the wait for the end of reasoning, and the cap on it."""

from __future__ import annotations

import numpy as np
import pytest
from llguidance import LLExecutor

from tests.grammars import EOS, allowed_ids, byte_tokenizer, compiler_for, ids_of, takes
from vllm_mlx.engine.constraint import (
    AfterReasoning,
    GrammarConstraint,
    Guide,
    ThinkingTracker,
    is_allowed,
    mask_of,
    prepare_guides,
)
from vllm_mlx.engine.markers import SpelledMarker
from vllm_mlx.engine.request import Prompt, Request, ThinkingBudget
from vllm_mlx.generation.grammar import ReasoningTokens
from vllm_mlx.generation.request import OutputFormat

TOKENIZER = byte_tokenizer(special=("<think>", "</think>"))
VOCAB = TOKENIZER.get_vocab_size()
EOS_ID = TOKENIZER.token_to_id(EOS)
OPEN, CLOSE = TOKENIZER.token_to_id("<think>"), TOKENIZER.token_to_id("</think>")
COMPILER = compiler_for(TOKENIZER)


def grammar(pattern: str, reasoning: ReasoningTokens | None = None):  # type: ignore[no-untyped-def]
    return COMPILER.output_format(OutputFormat("regex", pattern)).make(reasoning)


def ids(text: str) -> list[int]:
    return ids_of(TOKENIZER, text)


JOINED = 10_000
"""A token that holds the end of a marker and the line breaks behind it."""


def spelled(text: str) -> SpelledMarker:
    def bytes_of(token_id: int) -> bytes:
        return b">\n\n" if token_id == JOINED else TOKENIZER.decode([token_id]).encode()

    rests = tuple(tuple(ids(text[k:])) for k in range(len(text) + 1))
    return SpelledMarker(text.encode(), tuple(ids(text)), bytes_of, rests)


# -- grammars ---------------------------------------------------------------------------------------------------------


def test_a_grammar_allows_what_may_come_next() -> None:
    constraint = grammar("ab(c|d)?")
    assert allowed_ids(constraint) == set(ids("a"))
    assert takes(constraint, ids("ab"))
    assert constraint.is_complete and not constraint.is_finished
    assert allowed_ids(constraint) == {*ids("cd"), EOS_ID}


def test_a_finished_grammar_allows_stop_tokens_only_and_for_ever() -> None:
    constraint = grammar("ab")
    assert takes(constraint, ids("ab"))
    for _ in range(3):
        assert constraint.is_finished and allowed_ids(constraint) == {EOS_ID}
        constraint.accept(EOS_ID)
    assert constraint.failure is None


def test_a_token_that_is_not_allowed_is_a_failure_and_not_an_exception() -> None:
    constraint = grammar("ab")
    constraint.accept(ids("z")[0])
    assert constraint.failure is not None and "grammar" in constraint.failure
    assert allowed_ids(constraint) == set() and not constraint.is_finished


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 5])
def test_rollback_takes_back_tokens_also_behind_the_end(num_tokens: int) -> None:
    text = [*ids("abc"), EOS_ID, EOS_ID]
    constraint = grammar("abc")
    states = []
    for token in text:
        states.append(allowed_ids(constraint))
        constraint.accept(token)
    constraint.rollback(num_tokens)
    assert allowed_ids(constraint) == states[len(text) - num_tokens]
    assert takes(constraint, text[len(text) - num_tokens :])


def test_drafts_are_judged_without_changing_the_state() -> None:
    constraint = grammar("abc")
    assert constraint.num_accepted_of(ids("abx")) == 2
    assert allowed_ids(constraint) == set(ids("a"))


def test_masks_computed_in_parallel_are_those_computed_alone() -> None:
    patterns = ["a+", "(yes|no)", "[0-9]{3}", "x", ".*"]
    guides = [Guide(grammar(p)) for p in patterns] + [None, Guide(None, None)]
    prepare_guides(guides, LLExecutor(2))
    for guide, pattern in zip(guides, patterns, strict=False):
        assert guide is not None
        mask = guide.mask()
        assert mask is not None and np.array_equal(mask, grammar(pattern).allowed())


def test_bits_of_a_mask() -> None:
    mask = mask_of([0, 31, 32, 70, 999], 71)
    assert mask.tolist() == [2**31 + 1, 1, 64]
    assert is_allowed(mask, 70) and not is_allowed(mask, 69) and not is_allowed(mask, 200) and is_allowed(None, 5)


# -- after the reasoning ----------------------------------------------------------------------------------------------


def test_everything_but_the_end_is_allowed_until_the_reasoning_ends() -> None:
    constraint = grammar("ab", ReasoningTokens((OPEN,), (CLOSE,), starts_open=True))
    assert isinstance(constraint, AfterReasoning)
    for token in ids("hm, ab?"):
        assert set(range(VOCAB)) - allowed_ids(constraint) == {EOS_ID} and not constraint.is_finished
        constraint.accept(token)
    constraint.accept(CLOSE)
    assert allowed_ids(constraint) == set(ids("a"))
    assert takes(constraint, ids("ab")) and constraint.is_finished


def test_a_model_may_open_its_reasoning_or_answer_at_once() -> None:
    reasoning = ReasoningTokens((OPEN,), (CLOSE,))
    at_once = grammar("ab", reasoning)
    assert allowed_ids(at_once) == {*ids("a"), OPEN}
    assert takes(at_once, ids("ab")) and at_once.is_finished
    thinking = grammar("ab", reasoning)
    thinking.accept(OPEN)
    assert {*ids("so?"), CLOSE} <= allowed_ids(thinking)
    assert takes(thinking, [*ids("so?"), CLOSE, *ids("ab")]) and thinking.is_finished


def test_an_answer_may_end_in_its_reasoning_where_an_empty_one_is_of_the_shape() -> None:
    constraint = grammar("(ab)?", ReasoningTokens((OPEN,), (CLOSE,), starts_open=True))
    assert constraint.allowed() is None


def test_a_grammar_begins_behind_a_marker_that_joined_what_follows() -> None:
    constraint = grammar("ab", ReasoningTokens(spelled("<t>"), spelled("</t>"), starts_open=True))
    for token in [*ids("hm </t"), JOINED]:
        constraint.accept(token)
    assert allowed_ids(constraint) == set(ids("a"))


def test_a_start_marker_of_several_tokens_shares_its_beginning_with_the_grammar() -> None:
    reasoning = ReasoningTokens(tuple(ids("[THINK]")), tuple(ids("[/THINK]")))
    answer = grammar(r"\[T[0-9]\]", reasoning)
    assert takes(answer, ids("[T")) and allowed_ids(answer) == {*ids("0123456789"), *ids("H")}
    assert takes(answer, ids("7]")) and answer.is_finished
    thought = grammar(r"\[T[0-9]\]", reasoning)
    assert takes(thought, ids("[TH")) and allowed_ids(thought) == set(ids("I"))
    assert takes(thought, ids("INK]what[/[/THINK]")) and allowed_ids(thought) == set(ids("["))
    assert takes(thought, ids("[T1]")) and thought.is_finished


# -- the cap on reasoning ---------------------------------------------------------------------------------------------


def run(tracker: ThinkingTracker, wanted: list[int]) -> list[int]:
    """What comes out when the model wants these tokens and the tracker has its way."""
    written = []
    queue = list(wanted)
    while queue:
        forced = tracker.forced()
        token = forced if forced is not None else queue.pop(0)
        tracker.accept(token)
        written.append(token)
    return written


def test_reasoning_ends_at_the_cap_and_the_answer_follows() -> None:
    tracker = ThinkingTracker(ThinkingBudget(3, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
    assert run(tracker, ids("abcdefg")) == [*ids("abc"), CLOSE, *ids("defg")]
    assert tracker.num_reasoning == 3 and not tracker.is_open


def test_reasoning_within_the_cap_is_left_alone() -> None:
    tracker = ThinkingTracker(ThinkingBudget(5, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
    wanted = [*ids("abc"), CLOSE, *ids("a long answer")]
    assert run(tracker, wanted) == wanted and tracker.num_reasoning == 3


def test_the_cap_waits_for_reasoning_that_the_model_opens() -> None:
    tracker = ThinkingTracker(ThinkingBudget(2, (OPEN,), (CLOSE,), (CLOSE,)))
    assert run(tracker, [*ids("xyz"), OPEN, *ids("abcd")]) == [*ids("xyz"), OPEN, *ids("ab"), CLOSE, *ids("cd")]


def test_a_cap_of_zero_closes_at_once() -> None:
    tracker = ThinkingTracker(ThinkingBudget(0, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
    assert run(tracker, ids("ab")) == [CLOSE, *ids("ab")] and tracker.num_reasoning == 0


def test_words_before_the_forced_marker_are_left_out_where_the_cap_has_no_room_for_them() -> None:
    forced = (*ids("\nDone."), CLOSE, *ids("\n"))
    tracker = ThinkingTracker(ThinkingBudget(5, (OPEN,), (CLOSE,), forced, starts_open=True))
    assert run(tracker, ids("abcdefgh")) == [*ids("abcde"), CLOSE, *ids("\nfgh")]
    assert tracker.num_reasoning == 5


def test_words_before_the_forced_marker_count_as_reasoning() -> None:
    forced = (*ids("\nDone."), CLOSE, *ids("\n"))
    tracker = ThinkingTracker(ThinkingBudget(10, (OPEN,), (CLOSE,), forced, starts_open=True))
    written = run(tracker, ids("abcdefghijklmno"))
    assert written == [*ids("abcd"), *forced, *ids("efghijklmno")]
    assert written.index(CLOSE) == 10 and tracker.num_reasoning == 10


def test_a_marker_the_model_has_begun_is_finished_not_restarted() -> None:
    end = tuple(ids("</t>"))
    tracker = ThinkingTracker(ThinkingBudget(3, (), end, end, starts_open=True))
    assert run(tracker, ids("ab<xyz")) == ids("ab</t>xyz")
    assert tracker.num_reasoning == 2


def test_a_cap_holds_where_the_marker_is_plain_text_that_joins_what_follows() -> None:
    forced = (*ids("\n</t"), JOINED)
    for starts_open, opening in ((True, ""), (False, "hm <t>")):
        tracker = ThinkingTracker(ThinkingBudget(3, spelled("<t>"), spelled("</t>"), forced, starts_open=starts_open))
        written = run(tracker, ids(f"{opening}abcdefg"))
        assert written == [*ids(f"{opening}ab"), *forced, *ids("cdefg")]
        assert tracker.num_reasoning == 3 and not tracker.is_open
    by_itself = ThinkingTracker(ThinkingBudget(9, (), spelled("</t>"), forced, starts_open=True))
    assert run(by_itself, [*ids("ab</t"), JOINED, *ids("long answer")])[-1] == ids("r")[0]
    assert by_itself.num_reasoning == 2


def test_a_budget_is_for_all_reasoning_of_an_answer() -> None:
    tracker = ThinkingTracker(ThinkingBudget(3, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
    assert run(tracker, [*ids("ab"), CLOSE, OPEN, *ids("cde")]) == [
        *ids("ab"),
        CLOSE,
        OPEN,
        *ids("c"),
        CLOSE,
        *ids("de"),
    ]


def test_only_close_to_the_cap_must_a_step_wait_for_its_token() -> None:
    tracker = ThinkingTracker(ThinkingBudget(6, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
    waits = []
    for token in ids("abcdef"):
        waits.append(tracker.needs_host_token)
        tracker.accept(token)
    assert waits == [False, False, False, False, True, True]


def test_with_two_tokens_in_flight_a_forced_token_is_never_missed() -> None:
    """Where a step need not wait, the two tokens the host has not read yet cannot make a forced one due."""
    for cap in range(8):
        tracker = ThinkingTracker(ThinkingBudget(cap, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True))
        waited, forced_at = [], []
        for token in ids("abcdefghij"):
            waited.append(tracker.needs_host_token)
            forced = tracker.forced()
            forced_at.append(forced is not None)
            tracker.accept(forced if forced is not None else token)
        for i, is_forced in enumerate(forced_at):
            assert not is_forced or waited[max(0, i - 2)]


# -- guides -----------------------------------------------------------------------------------------------------------


def request(**parts: object) -> Request:
    return Request("r", Prompt((1,)), max_tokens=5, **parts)  # type: ignore[arg-type]


def test_a_plain_request_has_no_guide() -> None:
    assert Guide.of(request()) is None


def test_a_guide_is_brought_to_where_the_completion_stands() -> None:
    guide = Guide.of(request(make_constraint=lambda: grammar("abc")), ids("ab"))
    assert guide is not None and guide.needs_host_token
    mask = guide.mask()
    assert mask is not None and is_allowed(mask, ids("c")[0]) and not is_allowed(mask, ids("a")[0])


def test_white_space_that_a_cap_writes_behind_the_marker_is_not_of_the_grammar() -> None:
    forced = (*ids("\n"), CLOSE, *ids("\n\n"))
    budget = ThinkingBudget(2, (OPEN,), (CLOSE,), forced, starts_open=True)
    reasoning = ReasoningTokens((OPEN,), (CLOSE,), starts_open=True)
    guide = Guide.of(request(make_constraint=lambda: grammar("ab", reasoning), thinking=budget))
    assert guide is not None
    guide.accept(ids("z")[0])
    while (token := guide.forced()) is not None:
        guide.accept(token)
    assert guide.failure is None and guide.constraint is not None and takes(guide.constraint, ids("ab"))


def test_a_forced_token_wins_over_the_grammar_which_then_begins() -> None:
    budget = ThinkingBudget(1, (OPEN,), (CLOSE,), (CLOSE,), starts_open=True)
    reasoning = ReasoningTokens((OPEN,), (CLOSE,), starts_open=True)
    guide = Guide.of(request(make_constraint=lambda: grammar("ab", reasoning), thinking=budget))
    assert guide is not None and guide.forced() is None and is_allowed(guide.mask(), ids("z")[0])
    guide.accept(ids("x")[0])
    assert guide.forced() == CLOSE and guide.mask() is None
    guide.accept(CLOSE)
    mask = guide.mask()
    assert guide.forced() is None and mask is not None and is_allowed(mask, ids("a")[0])
    for token in ids("ab"):
        guide.accept(token)
    assert guide.is_finished


def test_a_prepared_mask_is_computed_once_per_token() -> None:
    class Counting(GrammarConstraint):
        num_asked = 0

        def allowed(self) -> np.ndarray:
            self.num_asked += 1
            return super().allowed()

    compiled = COMPILER.output_format(OutputFormat("regex", "a*"))
    constraint = Counting(compiled.prototype.deep_copy(), vocab_size=VOCAB, stop_token_ids=[EOS_ID])
    guide = Guide(constraint)
    prepare_guides([guide])
    guide.mask()
    guide.mask()
    assert constraint.num_asked == 1
    guide.accept(ids("a")[0])
    guide.mask()
    assert constraint.num_asked == 2
