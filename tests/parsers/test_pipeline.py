"""The whole parser as generation uses it."""

from __future__ import annotations

import json
from itertools import zip_longest

import pytest

from tests.parsers.transcripts import TOOLS, Said, load, parse
from vllm_mlx.parsers.events import (
    ParserEvent,
    ParserNote,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from vllm_mlx.parsers.machine import coalesce
from vllm_mlx.parsers.pipeline import build, prompt_opens_reasoning
from vllm_mlx.parsers.schema import ToolSpec

CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def test_without_formats_all_text_is_content() -> None:
    parser = build()
    assert parse(parser, ["<think>a</think>", CALL]) == [TextDelta("<think>a</think>" + CALL)]
    assert parser.reasoning_markers is None
    assert parser.envelope is None
    assert not parser.needs_special_tokens
    assert not parser.keeps("<think>")


def test_without_tools_a_call_is_text() -> None:
    parser = build(tool_format="hermes")
    assert parse(parser, CALL) == [TextDelta(CALL)]
    assert parser.tool_format is None


def test_arguments_are_streamed_as_they_are_generated() -> None:
    parser = build(tool_format="hermes", tools=TOOLS)
    assert parser.feed('<tool_call>\n{"name": "get_weather", "argu') == []
    assert parser.feed('ments": {"city": "Pa') == [
        ToolCallStarted(0, "get_weather"),
        ToolCallDelta(0, '{"city": "Pa'),
    ]
    assert parser.feed("ris, France") == [ToolCallDelta(0, "ris, France")]
    assert parser.feed('"}') == [ToolCallDelta(0, '"}')]
    assert parser.feed("}\n</tool_call>") == [ToolCallEnded(0)]


@pytest.mark.parametrize(
    ("tool_format", "head"),
    [
        ("qwen3_coder", "<tool_call>\n<function=write_file>\n<parameter=content>\n"),
        ("glm45", "<tool_call>write_file\n<arg_key>content</arg_key>\n<arg_value>"),
        ("mistral", '[TOOL_CALLS]write_file[ARGS]{"content": "'),
        ("llama", '{"name": "write_file", "parameters": {"content": "'),
        ("llama4", '[write_file(content="'),
        ("kimi", '<|tool_call_begin|>functions.write_file:0<|tool_call_argument_begin|>{"content": "'),
        ("deepseek_v31", '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>write_file<｜tool▁sep｜>{"content": "'),
        (
            "deepseek_v32",
            '<｜DSML｜function_calls>\n<｜DSML｜invoke name="write_file">\n'
            '<｜DSML｜parameter name="content" string="true">',
        ),
        ("gemma4", '<|tool_call>call:write_file{content:<|"|>'),
        ("minimax", '<minimax:tool_call>\n<invoke name="write_file">\n<parameter name="content">'),
        ("harmony", '<|channel|>commentary to=functions.write_file <|constrain|>json<|message|>{"content": "'),
    ],
)
def test_a_long_string_is_not_held_back_in_any_kind_of_format(tool_format: str, head: str) -> None:
    parser = build(tool_format=tool_format, tools=TOOLS)
    said = "".join(e.arguments for e in parser.feed(head) if isinstance(e, ToolCallDelta))
    for piece in ("first words ", "and then more ", "and the last"):
        said += "".join(e.arguments for e in parser.feed(piece) if isinstance(e, ToolCallDelta))
        assert said.endswith(piece)
    assert said == '{"content": "first words and then more and the last'


def test_name_comes_first_even_when_arguments_do() -> None:
    parser = build(tool_format="hermes", tools=TOOLS)
    assert parser.feed('<tool_call>{"arguments": {"city": "Paris"}, ') == []
    events = parser.feed('"name": "get_weather"}</tool_call>')
    assert events == [ToolCallStarted(0, "get_weather"), ToolCallDelta(0, '{"city": "Paris"}'), ToolCallEnded(0)]


def test_a_call_cut_off_is_closed_and_marked_incomplete() -> None:
    events = parse(build(tool_format="hermes", tools=TOOLS), [CALL[: CALL.index("ris")]])
    assert ToolCallEnded(0, is_complete=False) in events
    assert Said.of(events).calls == [{"name": "get_weather", "arguments": {"city": "Pa"}, "is_complete": False}]
    assert "closed early" in Said.of(events).notes


def test_a_call_whose_closing_marker_alone_is_missing_is_complete() -> None:
    events = parse(build(tool_format="hermes", tools=TOOLS), [CALL.removesuffix("\n</tool_call>")])
    assert Said.of(events).completeness == [True]
    assert any(isinstance(e, ParserNote) and "missing" in e.reason for e in events)


def test_a_call_that_never_was_one_comes_back_as_text_with_a_reason() -> None:
    text = "Look: <tool_call> opens a call."
    said = Said.of(parse(build(tool_format="hermes", tools=TOOLS), [text]))
    assert said.text == text
    assert "did not open a tool call" in said.notes


def test_text_inside_a_call_waits_until_the_call_has_ended() -> None:
    text = "<tool_call>\n<function=now>\nstray words\n</function>\n</tool_call>"
    events = parse(build(tool_format="qwen3_coder", tools=TOOLS), text)
    kinds = [type(e) for e in events if not isinstance(e, ParserNote)]
    assert kinds == [ToolCallStarted, ToolCallDelta, ToolCallEnded, TextDelta]
    assert "stray words" in Said.of(events).text


def test_calls_are_counted_and_named_as_the_request_spells_them() -> None:
    parser = build(tool_format="hermes", tools=TOOLS)
    text = '<tool_call>{"name": "functions.now", "arguments": {}}</tool_call>'
    assert Said.of(parse(parser, text * 2)).names == ["now", "now"]
    assert parser.num_calls == 2


def test_a_json_answer_is_no_call_although_tools_are_there() -> None:
    answer = json.dumps({"name": "Alice", "arguments": {"a": 1}, "type": "person"})
    for tool_format in ("hermes", "llama", "xlam", "auto", "llama4", "functionary"):
        assert parse(build(tool_format=tool_format, tools=TOOLS), answer) == [TextDelta(answer)], tool_format


def test_reasoning_state_is_known_at_each_moment() -> None:
    parser = build(reasoning_format="qwen3")
    assert not parser.is_reasoning_open
    parser.feed("<think>\nLet me")
    assert parser.is_reasoning_open
    parser.feed(" see.</thi")
    assert parser.is_reasoning_open
    parser.feed("nk>")
    assert not parser.is_reasoning_open
    parser = build(reasoning_format="qwen3", starts_open=True)
    assert parser.is_reasoning_open


def test_an_answer_that_does_not_think_is_all_content() -> None:
    parser = build(reasoning_format="qwen3")
    assert parser.feed("Hello") == [TextDelta("Hello")]
    assert parse(build(reasoning_format="deepseek_r1"), ["Hello, ", "you."]) == [TextDelta("Hello, you.")]


def test_the_end_of_reasoning_repeated_by_the_model_is_not_shown() -> None:
    assert Said.of(parse(build(reasoning_format="qwen3"), "\n</think>\n\nHello.")).text == "Hello."


def test_reasoning_opened_twice_shows_no_marker() -> None:
    said = Said.of(parse(build(reasoning_format="qwen3", starts_open=True), "<think>\nHm.\n</think>\nHello."))
    assert (said.reasoning, said.text) == ("Hm.", "Hello.")


def test_markers_for_a_thinking_budget() -> None:
    markers = build(reasoning_format="qwen3").reasoning_markers
    assert markers is not None
    assert (markers.start, markers.end) == ("<think>", "</think>")
    assert "</think>" in markers.forced_end
    harmony = build(reasoning_format="gpt_oss").reasoning_markers
    assert harmony is not None
    assert harmony.forced_end.endswith(harmony.end)


def test_harmony_reasoning_is_open_until_the_final_message() -> None:
    parser = build(reasoning_format="harmony")
    for text in ("<|channel|>analysis<|message|>Hm.", "<|end|>", "<|start|>assistant<|channel|>fin", "al"):
        parser.feed(text)
        assert parser.is_reasoning_open
    assert parser.feed("<|message|>Hello") == [TextDelta("Hello")]
    assert not parser.is_reasoning_open


def test_harmony_without_tools_shows_a_call_as_reasoning_not_as_markup() -> None:
    text = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'
    events = parse(build(reasoning_format="harmony"), text)
    assert [e for e in events if not isinstance(e, ParserNote)] == [ReasoningDelta('{"a": 1}')]


def test_special_tokens_that_are_part_of_a_marker_are_kept() -> None:
    parser = build(tool_format="gemma4", reasoning_format="gemma4", tools=TOOLS)
    assert parser.needs_special_tokens
    for token in ("<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>"):
        assert parser.keeps(token)
    assert not parser.keeps("<turn|>")


@pytest.mark.parametrize(
    ("reasoning_format", "prompt", "is_open"),
    [
        ("qwen3", "<|im_start|>assistant\n<think>\n", True),
        ("qwen3", "<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("qwen3", "<|im_start|>assistant\n", False),
        ("qwen3", "<|im_start|>user\nWhat is <think>?<|im_end|>\n<|im_start|>assistant\n", False),
        ("deepseek_v31", "<｜Assistant｜></think>", False),
        ("deepseek_v31", "<｜Assistant｜><think>", True),
        ("gemma4", "<|turn>model\n<|channel>thought\n<channel|>", False),
        ("kimi_k3", '<|open|>message role="assistant"<|sep|><|open|>think<|sep|>', True),
        (None, "<think>", False),
    ],
)
def test_prompt_tells_whether_the_answer_starts_in_reasoning(
    reasoning_format: str | None, prompt: str, is_open: bool
) -> None:
    assert prompt_opens_reasoning(reasoning_format, prompt) is is_open


def test_tools_with_odd_names_and_schemas_are_no_trouble() -> None:
    tools = [ToolSpec("a.b/c-d", {"properties": "nonsense"}), ToolSpec("é", {})]
    text = '<tool_call>{"name": "a.b/c-d", "arguments": {"x": 1}}</tool_call><tool_call>{"name": "é"}</tool_call>'
    assert Said.of(parse(build(tool_format="hermes", tools=tools), text)).names == ["a.b/c-d", "é"]


@pytest.mark.parametrize("tool_format", ["hermes", "qwen3_coder", "harmony", "auto"])
def test_two_requests_share_nothing(tool_format: str) -> None:
    texts = [case.text for case in load() if case.format == tool_format or tool_format == "auto"][:6]
    alone = [parse(build(tool_format=tool_format, tools=TOOLS), text) for text in texts]
    parsers = [build(tool_format=tool_format, tools=TOOLS) for _ in texts]
    together: list[list[ParserEvent]] = [[] for _ in texts]
    for characters in zip_longest(*texts, fillvalue=""):
        for parser, events, character in zip(parsers, together, characters, strict=True):
            events += parser.feed(character)
    assert [coalesce([*events, *parser.finish()]) for parser, events in zip(parsers, together, strict=True)] == alone
