"""What agents put into prompts that differs from request to request is left out, and nothing else is."""

from __future__ import annotations

import pytest

from vllm_mlx.generation.request import ChatMessage, GenerationRequest, ReasoningOptions, TextPart, Tool
from vllm_mlx.generation.steady import steady
from vllm_mlx.settings import AgentSettings

BILLING = "x-anthropic-billing-header: cc_version=2.1.197.a1b; cc_entrypoint=cli; cch=00{0};"
COUNT = "<total_tokens>{0} tokens left</total_tokens>"
USAGE = "<system-reminder>\nToken usage: {0}/200000; 1{0} remaining\n</system-reminder>"
ON = AgentSettings()


def say(role: str, *texts: str) -> ChatMessage:
    return ChatMessage(role, tuple(TextPart(text) for text in texts))


def request(*messages: ChatMessage, **fields) -> GenerationRequest:
    return GenerationRequest(id="r", messages=messages, **fields)


def said(given: GenerationRequest, settings: AgentSettings = ON) -> list[tuple[str, str]]:
    return [(m.role, "|".join(p.text for p in m.parts)) for m in steady(given, settings).messages]


@pytest.mark.parametrize(
    "system",
    [
        (BILLING, "You help."),
        (BILLING + "\nYou help.",),
        ("You help.", COUNT),
        ("You help.\n\n" + COUNT + "\n" + COUNT,),
        ("You help." + USAGE,),
    ],
)
def test_moving_lines_in_the_system_text_do_not_move_the_prompt(system):
    for number in ("17", "99"):
        texts = [text.replace("{0}", number) for text in system]
        assert said(request(say("system", *texts), say("user", "Hi"))) == [("system", "You help."), ("user", "Hi")]


@pytest.mark.parametrize("counter", [COUNT, USAGE, COUNT + "\n" + USAGE])
def test_turns_and_parts_that_only_count_are_left_out(counter):
    counter = counter.replace("{0}", "17")
    given = request(say("user", "Hi", counter), say("system", counter), say("tool", "out"), say("user", counter))
    assert said(given) == [("user", "Hi"), ("tool", "out")]


def test_a_counter_that_people_or_tools_quote_stays():
    quoted = f"the log says {COUNT} and then fails"
    given = request(say("user", quoted), say("tool", f"1\n{USAGE}\n2"), say("assistant", COUNT.replace("{0}", "5")))
    assert said(given) == [(m.role, m.text) for m in given.messages]
    bare = request(say("user", "12 tokens left"), say("tool", "12 tokens left"))
    assert said(bare) == [(m.role, m.text) for m in bare.messages]
    assert said(request(say("user", "Hi"), say("system", "Token usage: 1/9; 8 remaining"))) == [("user", "Hi")]
    later = request(say("user", "Hi"), say("user", BILLING), say("system", f"See {BILLING}"))
    assert said(later) == [(m.role, m.text) for m in later.messages]


def test_a_result_that_is_only_a_counter_still_answers_its_call():
    given = request(say("user", "Hi"), ChatMessage("tool", (TextPart(COUNT.replace("{0}", "1")),), tool_call_id="c"))
    turns = steady(given, ON).messages
    assert turns[1].tool_call_id == "c" and turns[1].parts == ()


def test_a_conversation_of_nothing_but_counters_stays_as_it_is():
    given = request(say("user", COUNT.replace("{0}", "5")))
    assert steady(given, ON).messages == given.messages


def test_each_rule_can_be_switched_off():
    given = request(say("system", BILLING, "You help."), say("user", "Hi"), say("system", "5 tokens left"))
    off = AgentSettings(strip_volatile=False, keep_reasoning="template")
    assert steady(given, off).messages == given.messages


def test_later_system_turns_stay_or_move_as_the_operator_says():
    given = request(say("system", "A"), say("user", "Hi"), say("system", "Plan mode"), say("user", "Go"))
    assert [role for role, _ in said(given)] == ["system", "user", "system", "user"]
    as_user = said(given, AgentSettings(system_turns="as-user"))
    assert [role for role, _ in as_user] == ["system", "user", "user", "user"] and "Plan mode" in as_user[2][1]
    front = said(given, AgentSettings(system_turns="front"))
    assert front == [("system", "A"), ("system", "Plan mode"), ("user", "Hi"), ("user", "Go")]


@pytest.mark.parametrize(
    ("rule", "has_tools", "asked", "kept"),
    [
        ("auto", True, None, True), ("auto", False, None, False), ("always", False, None, True),
        ("template", True, None, False), ("auto", False, True, True), ("auto", True, False, False),
        ("template", True, True, False),
    ],
)  # fmt: skip
def test_when_earlier_reasoning_is_kept(rule, has_tools, asked, kept):
    tools = (Tool("f"),) if has_tools else ()
    given = request(say("user", "Hi"), tools=tools, reasoning=ReasoningOptions(keep_earlier=asked))
    assert steady(given, AgentSettings(keep_reasoning=rule)).reasoning.keep_earlier is kept


def test_tools_are_sorted_only_when_asked():
    given = request(say("user", "Hi"), tools=(Tool("b"), Tool("a")))
    assert [t.name for t in steady(given, ON).tools] == ["b", "a"]
    assert [t.name for t in steady(given, AgentSettings(sort_tools=True)).tools] == ["a", "b"]
