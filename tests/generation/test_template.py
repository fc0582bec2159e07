"""Templates here are small stand-ins for the habits of real families; none is a copy of one."""

import pytest

from tests.fakes import CHATML, ByteTokenizer
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import ChatMessage, MediaPart, TextPart, Tool, ToolCall
from vllm_mlx.generation.template import ChatTemplate

# One system turn, at the front, else it raises; content of any form; arguments as an object (Qwen 3.5).
STRICT_SYSTEM = """\
{%- for m in messages %}
{%- if m.role == 'system' %}
{%- if not loop.first %}{{ raise_exception('System message must be first.') }}{% endif %}<|im_start|>system
{{ m.content }}<|im_end|>
{%- else %}<|im_start|>{{ m.role }}
{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}:
{%- for k, v in c.function.arguments|items %}{{ k }}={{ v }}{% endfor %}]{% endfor %}<|im_end|>
{%- endif %}
{%- endfor %}
{%- if tools %}{{ tools | tojson }}{% endif %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

# No system turn at all, and users and assistants must take turns; no tools (Gemma 2).
ALTERNATING = """\
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif -%}
<start>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end>
{% endfor %}
{%- if add_generation_prompt %}<start>model
{% endif %}"""

# Reads the first system turn only; later ones vanish without a word. Arguments are concatenated as text (DeepSeek).
SILENT = """\
{%- set ns = namespace(system='') %}
{%- for m in messages %}{% if m.role == 'system' and loop.first %}{% set ns.system = m.content %}{% endif %}{% endfor %}
{{- ns.system }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}<|User|>{{ m.content }}
{%- elif m.role == 'assistant' %}<|Assistant|>{{ m.content }}
{%- for c in m.tool_calls or [] %}{{ '<call>' + c.function.name + ':' + c.function.arguments + '</call>' }}{% endfor %}
{%- elif m.role == 'tool' %}<|Tool|>{{ m.content }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|Assistant|>{% endif %}"""

# Walks over parts, so a string would come out letter by letter (SmolVLM).
PARTS_ONLY = """\
{%- for m in messages %}{{ m.role }}: {% for p in m.content %}
{%- if p.type == 'text' %}{{ p.text }}{% elif p.type == 'image' %}<image>{% endif %}
{%- endfor %}<end>
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""

# Prints the object of the arguments as Python would; keeps reasoning (a template written for string arguments).
PRINTS = """\
{%- for m in messages %}{{ m.role }}: {% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}
{%- for c in m.tool_calls or [] %}<{{ c.function.name }} {{ c.function.arguments }}>{% endfor %};
{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"""

# Walks over the tools even where there are none, and drops later system turns (Phi 4).
ALWAYS_TOOLS = """\
{%- if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}<|end|>{% endif %}
{%- for t in tools %}<|tool|>{{ t.function | tojson }}<|/tool|>{% endfor %}
{%- for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}
{%- for c in m.tool_calls %}<|tool_call|>{{ c.function | tojson }}<|/tool_call|>{% endfor %}<|end|>
{%- endif %}{% endfor %}"""

# Wants ids of nine letters and digits, an answer between a result and the next user turn, and turns that alternate
# when the tool turns are left out (Mistral).
MISTRAL = """\
{%- set loop_messages = messages[1:] if messages[0].role == 'system' else messages %}
{%- set ns = namespace(index=0) %}
{%- for m in loop_messages %}{% if m.role != 'tool' and not m.tool_calls %}
{%- if (m.role == 'user') != (ns.index % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{%- set ns.index = ns.index + 1 %}{% endif %}{% endfor %}
{%- if messages[0].role == 'system' %}[SYSTEM_PROMPT]{{ messages[0].content }}[/SYSTEM_PROMPT]{% endif %}
{%- if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}
{%- for m in loop_messages %}
{%- if m.role == 'user' %}[INST]{{ m.content }}[/INST]
{%- elif m.role == 'tool' %}
{%- if m.tool_call_id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[TOOL_RESULTS]{{ m.tool_call_id }}:{{ m.content }}[/TOOL_RESULTS]
{%- elif m.tool_calls %}{% for c in m.tool_calls %}
{%- if c.id | length != 9 %}{{ raise_exception('ids have nine characters') }}{% endif -%}
[TOOL_CALLS]{{ c.function | tojson }}:{{ c.id }}{% endfor %}</s>
{%- elif m.role == 'assistant' %}{{ m.content }}</s>
{%- else %}{{ raise_exception('unknown role') }}{% endif %}
{%- endfor %}"""

# One call a turn, or it raises (Llama 3).
ONE_CALL = """\
{%- for m in messages %}<{{ m.role }}>
{%- if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls only') }}{% endif %}
{{- m.tool_calls[0].function.name }}({{ m.tool_calls[0].function.arguments | tojson }})
{%- else %}{{ m.content }}{% endif %}
{%- endfor %}{% if tools %}{{ tools | tojson }}{% endif %}"""

# Shows tools and results, but drops the calls in between (an early Kimi K2).
DROPS_CALLS = """\
{%- if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"""

ALL = {
    "chatml": CHATML,
    "strict system": STRICT_SYSTEM,
    "alternating": ALTERNATING,
    "silent": SILENT,
    "parts only": PARTS_ONLY,
    "prints": PRINTS,
    "always tools": ALWAYS_TOOLS,
    "mistral": MISTRAL,
    "one call": ONE_CALL,
    "drops calls": DROPS_CALLS,
}

TOOL = Tool("weather", "Says it.", {"type": "object", "properties": {"city": {"type": "string"}}})


def template(source, placeholders=None):
    return ChatTemplate(ByteTokenizer(source), source, placeholders)


def turn(role, *texts, **fields):
    return ChatMessage(role, tuple(TextPart(t) for t in texts), **fields)


def image(name="x"):
    return MediaPart("image", name, "messages.0.content.0")


TALK = [turn("system", "S1"), turn("user", "U1"), turn("assistant", "A1"), turn("system", "S2"), turn("user", "U2")]
CALLS = [
    turn("user", "U1"),
    turn("assistant", "", tool_calls=(ToolCall("c1", "weather", '{"city": "Köln"}'),)),
    turn("tool", "sunny", tool_call_id="c1"),
    turn("assistant", "A2"),
    turn("user", "U2"),
]


def positions(text, *words):
    found = [text.find(w) for w in words]
    assert -1 not in found, (words, text)
    return found


@pytest.mark.parametrize("name", ALL)
def test_no_turn_is_lost_or_moved_whatever_the_template_can_take(name):
    order = positions(template(ALL[name]).render(TALK), "S1", "U1", "A1", "S2", "U2")
    assert order == sorted(order)


@pytest.mark.parametrize("name", ALL)
def test_an_agents_turns_survive_whatever_the_template_can_take(name):
    """Two calls in a turn, short and long ids, words of the user behind the results, a system turn in between."""
    turns = [
        turn("system", "S1"),
        turn("system", "S2"),
        turn("user", "U1"),
        turn(
            "assistant",
            "",
            tool_calls=(
                ToolCall("c1", "weather", '{"city": "Ulm"}'),
                ToolCall("call_" + "x" * 24, "weather", '{"city": "Rom"}'),
            ),
        ),
        turn("tool", "R1", tool_call_id="c1"),
        turn("tool", "R2", tool_call_id="call_" + "x" * 24),
        turn("user", "U2"),
        turn("system", "S3"),
        turn("assistant", "A1"),
        turn("user", "U3"),
    ]
    text = template(ALL[name]).render(turns, [TOOL])
    words = ("S1", "S2", "U1", "R1", "R2", "U2", "S3", "A1", "U3")
    assert positions(text, *words) == sorted(positions(text, *words))
    calls = positions(text, "Ulm", "Rom")
    assert text.find("U1") < calls[0] < text.find("R1") and calls[0] < calls[1] < text.find("R2")
    assert "Says it." in text


def test_a_later_system_turn_becomes_a_user_turn_in_its_place_where_it_must():
    text = template(STRICT_SYSTEM).render(TALK)
    assert "<|im_start|>user\n<system-reminder>\nS2\n</system-reminder><|im_end|>" in text
    assert "system-reminder" not in template(CHATML).render(TALK)


def test_leading_system_turns_are_merged_where_only_one_is_taken():
    text = template(STRICT_SYSTEM).render([turn("system", "S1"), turn("system", "S2"), turn("user", "U")])
    assert "<|im_start|>system\nS1\n\nS2<|im_end|>" in text


def test_without_a_system_role_its_text_opens_the_first_user_turn():
    text = template(ALTERNATING).render([turn("system", "S1"), turn("user", "U1")])
    assert text == "<start>user\nS1\n\nU1<end>\n<start>model\n"
    assert "S1" in template(ALTERNATING).render([turn("system", "S1")])


def test_neighbours_of_one_role_are_merged_where_turns_must_alternate():
    text = template(ALTERNATING).render(
        [turn("user", "U1"), turn("user", "U2"), turn("assistant", "A"), turn("user", "U3")]
    )
    assert "<start>user\nU1\n\nU2<end>" in text


def test_a_string_and_the_same_text_in_blocks_render_alike():
    for source in (CHATML, PARTS_ONLY, STRICT_SYSTEM):
        made = template(source)
        assert made.render([turn("user", "one\ntwo")]) == made.render([turn("user", "one", "two")])
        assert made.render([turn("user", "one two")]) == made.render([turn("user", "one ", "two")])


def test_templates_that_walk_over_parts_get_parts():
    traits = template(PARTS_ONLY).traits
    assert (traits.takes_strings, traits.takes_parts) == (False, True)
    assert "user: hello<end>" in template(PARTS_ONLY).render([turn("user", "hello")])


# ── tools ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_arguments_reach_the_template_in_the_form_it_wants():
    assert '"arguments": {"city": "Köln"}' in template(CHATML).render(CALLS, [TOOL])
    assert "[weather:city=Köln]" in template(STRICT_SYSTEM).render(CALLS, [TOOL])
    assert '<call>weather:{"city": "Köln"}</call>' in template(SILENT).render(CALLS, [TOOL])
    assert '<weather {"city": "Köln"}>' in template(PRINTS).render(CALLS, [TOOL])


def test_arguments_that_are_no_object_pass_as_they_are():
    calls = [
        turn("user", "U"),
        turn("assistant", "", tool_calls=(ToolCall("c", "weather", "{broken"),)),
        turn("user", "V"),
    ]
    assert "{broken" in template(CHATML).render(calls, [TOOL])


def test_tools_are_shown_by_templates_that_know_them():
    for source in (CHATML, STRICT_SYSTEM, SILENT, PRINTS):
        assert template(source).traits.takes_tools
        assert '"city"' in template(source).render(CALLS[:1], [TOOL])


def test_tools_are_described_to_templates_that_know_none():
    made = template(ALTERNATING)
    assert not made.traits.takes_tools
    text = made.render([turn("system", "S"), *CALLS], [TOOL])
    order = positions(
        text,
        "S\n\n# Tools",
        '"name": "weather"',
        "U1",
        '{"name": "weather", "arguments": {"city": "Köln"}}',
        "<tool_response>\nsunny",
        "A2",
        "U2",
    )
    assert order == sorted(order)


def test_tools_are_described_in_the_models_own_format_where_that_is_known():
    source = ALTERNATING
    made = ChatTemplate(ByteTokenizer(source), source, tool_format="kimi")
    text = made.render([turn("user", "U")], [TOOL])
    assert made.described_format == "kimi"
    assert "<|tool_call_begin|>functions.<function name>:0<|tool_call_argument_begin|>" in text
    assert ChatTemplate(ByteTokenizer(source), source, tool_format="glm45").described_format == "hermes"


def test_ids_that_a_template_refuses_are_shortened_alike_in_call_and_result():
    made = template(MISTRAL)
    assert made.traits.call_ids == "nine" and template(CHATML).traits.call_ids == "any"
    text = made.render(CALLS, [TOOL])
    short = text.partition("[TOOL_RESULTS]")[2][:9]
    assert text.count(short) == 2 and short.isalnum()


def test_a_tool_result_knows_its_functions_name():
    seen = []

    class Spy(ByteTokenizer):
        def apply_chat_template(self, conversation, **options):
            seen.append(conversation)
            return super().apply_chat_template(conversation, **options)

    ChatTemplate(Spy(CHATML), CHATML).render(CALLS, [TOOL])
    result = next(t for t in seen[-1] if t["role"] == "tool")
    assert (result["name"], result["tool_call_id"]) == ("weather", "c1")


# ── reasoning, continuing ───────────────────────────────────────────────────────────────────────────────────────────


def test_earlier_reasoning_reaches_templates_that_read_it():
    talk = [turn("user", "U"), turn("assistant", "A", reasoning="because"), turn("user", "V")]
    assert template(PRINTS).traits.reasoning_key == "reasoning_content"
    assert "(because)A" in template(PRINTS).render(talk)
    assert "because" not in template(ALTERNATING).render(talk)


def test_the_last_assistant_message_can_be_continued():
    talk = [turn("user", "U"), turn("assistant", "It is")]
    text = template(CHATML).render(talk, continue_final_message=True)
    assert text.endswith("<|im_start|>assistant\nIt is")
    with pytest.raises(InvalidRequest, match="assistant"):
        template(CHATML).render(talk[:1], continue_final_message=True)


def test_a_template_that_refuses_is_quoted():
    source = "{{ raise_exception('Only poems are understood.') }}"
    with pytest.raises(InvalidRequest, match="Only poems") as caught:
        template(source).render([turn("user", "U")])
    assert caught.value.param == "messages"
    with pytest.raises(InvalidRequest):
        template("{{ messages[0].content.nothing.here }}").render([turn("user", "U")])


def test_template_variables_cannot_reach_the_renderers_own_arguments():
    for name in ("chat_template", "tokenize", "tools", "add_generation_prompt", "messages"):
        with pytest.raises(InvalidRequest):
            template(CHATML).check_variables({name: 1})
    template(CHATML).check_variables({"enable_thinking": False, "documents": []})


# ── media ───────────────────────────────────────────────────────────────────────────────────────────────────────────

VISION = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}


def test_media_stand_where_they_stood():
    message = ChatMessage("user", (TextPart("a"), image(), TextPart("b"), image(), TextPart("c")))
    one = VISION["image"]
    assert f"a{one}b{one}c<|im_end|>" in template(CHATML, VISION).render([message])


def test_a_template_that_knows_no_media_gets_the_placeholders_written():
    message = ChatMessage("user", (image(), TextPart("what?")))
    assert "<start>user\n<image>\nwhat?<end>" in template(ALTERNATING, {"image": "<image>"}).render([message])


def test_media_of_a_tool_result_move_behind_it_where_the_template_drops_them():
    result = ChatMessage("tool", (TextPart("done"), image("a")), tool_call_id="c1")
    second = ChatMessage("tool", (image("b"),), tool_call_id="c2")
    made = template(CHATML, VISION)
    assert ("user", "image") in made.traits.media and ("tool", "image") not in made.traits.media
    placed = made.place_media([*CALLS[:2], result, second, turn("assistant", "A")])
    assert [m.role for m in placed] == ["user", "assistant", "tool", "tool", "user", "assistant"]
    assert [p.source for p in placed[4].parts] == ["a", "b"]
    assert placed[2].text == "done" and placed[3].text
    assert made.place_media([*CALLS[:2], result])[-1].role == "user"


def test_media_stay_where_the_template_writes_them():
    made = template(PARTS_ONLY, {"image": "<image>"})
    message = ChatMessage("system", (image(), TextPart("look")))
    assert made.place_media([message]) == (message,)
    assert "system: <image>look<end>" in made.render([message])
