"""Reasoning of earlier turns stays where it was computed, so that each prompt of a session extends the one before."""

from __future__ import annotations

import pytest

from tests.fakes import ByteTokenizer
from vllm_mlx.generation.kept_reasoning import Kept
from vllm_mlx.generation.request import ChatMessage, TextPart, Tool, ToolCall
from vllm_mlx.generation.template import ChatTemplate

# Writes the reasoning of what follows the last user turn only, and a gap before a call that words precede (Qwen 3).
DROPS_EARLIER = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
{%- else %}{{- m.content }}{% endif %}
{%- for c in m.tool_calls or [] %}
{%- if (loop.first and m.content) or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<call>' + c.function.name + (c.function.arguments | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if tools %}{{ '' }}{% endif %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
KEEPS = DROPS_EARLIER.replace(" and loop.index0 > ns.last", "")
SWITCHED = DROPS_EARLIER.replace("loop.index0 > ns.last", "(preserve_thinking or loop.index0 > ns.last)")
NONE = """\
{%- for m in messages %}{{ m.role }}: {{ m.content }}
{% endfor %}"""
TOOLS = (Tool("ls", "d", {"type": "object", "properties": {}}),)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(ByteTokenizer(), source)


def say(role: str, text: str, **fields) -> ChatMessage:
    return ChatMessage(role, (TextPart(text),) if text else (), **fields)


def call(text: str, reasoning: str, id: str) -> ChatMessage:
    return say("assistant", text, reasoning=reasoning, tool_calls=(ToolCall(id, "ls", "{}"),))


SESSION = [
    say("user", "list"),
    call("", "need ls", "c1"),
    say("tool", "a.txt", tool_call_id="c1"),
    call("Once more.", "again", "c2"),
    say("tool", "b.txt", tool_call_id="c2"),
    say("assistant", "Two files.", reasoning="both seen"),
    say("user", "thanks"),
    say("assistant", "Welcome.", reasoning=""),
    say("user", "more"),
]


def test_the_frame_is_what_the_template_writes_around_the_last_reasoning():
    assert template(DROPS_EARLIER).traits.reasoning_frame == ("<think>\n", "\n</think>\n\n")
    assert template(DROPS_EARLIER).traits.call_gap == "\n"
    assert template(KEEPS).traits.reasoning_frame is None
    assert template(NONE).traits.reasoning_frame is None and template(NONE).traits.call_gap == ""


@pytest.mark.parametrize("source", [DROPS_EARLIER, KEEPS, SWITCHED])
def test_every_prompt_of_a_session_extends_the_one_before(source):
    """What was generated stands in the next prompt as it was: the rendering of a turn never changes later."""
    made = template(source)
    previous = ""
    for i, turn in enumerate(SESSION):
        if turn.role == "assistant":
            continue
        text = made.render(SESSION[: i + 1], TOOLS, add_generation_prompt=False, keep_reasoning=True)
        assert text.startswith(previous) and "\ufdd1" not in text
        previous = text
    for reasoning in ("need ls", "again", "both seen"):
        assert previous.count(f"<think>\n{reasoning}\n</think>\n\n") == 1
    assert "</think>\n\n<call>ls{}</call>" in previous and "</think>\n\nOnce more.\n<call>ls{}</call>" in previous


def test_without_it_the_template_has_its_way():
    made = template(DROPS_EARLIER)
    assert "need ls" not in made.render(SESSION, TOOLS)
    assert made.render(SESSION[:5], TOOLS).count("<think>") == 2


def test_a_template_without_reasoning_renders_as_before():
    made = template(NONE)
    assert made.render(SESSION, TOOLS, keep_reasoning=True) == made.render(SESSION, TOOLS)


def test_a_mistake_of_ours_is_not_blamed_on_the_template(monkeypatch):
    def mistaken(self, text):
        raise LookupError("ours")

    monkeypatch.setattr(Kept, "fill", mistaken)
    with pytest.raises(LookupError):
        template(DROPS_EARLIER).render(SESSION, TOOLS, keep_reasoning=True)


def test_a_turn_that_is_continued_keeps_its_reasoning_once():
    made = template(DROPS_EARLIER)
    text = made.render(SESSION[:6], TOOLS, keep_reasoning=True, continue_final_message=True)
    assert text.endswith("<think>\nboth seen\n</think>\n\nTwo files.")


def test_a_mark_in_what_people_write_does_no_harm():
    made = template(DROPS_EARLIER)
    text = made.render([say("user", "\ufdd11\ufdd1"), *SESSION[1:]], TOOLS, keep_reasoning=True)
    assert "need ls" in text
