"""The grammar compiler: every kind of output format, the cache, the requests it refuses, whole requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.grammars import EOS, allowed_ids, byte_tokenizer, compiler_for, ids_of, takes, text_of
from vllm_mlx.engine.constraint import AfterReasoning, is_allowed
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.grammar import GrammarCompiler, ReasoningTokens
from vllm_mlx.generation.request import OutputFormat, Tool, ToolChoice
from vllm_mlx.parsers.tool_parser import Envelope
from vllm_mlx.parsers.tools import harmony

TOKENIZER = byte_tokenizer(special=("<think>", "</think>"))
EOS_ID = TOKENIZER.token_to_id(EOS)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}


@pytest.fixture
def compiler() -> GrammarCompiler:
    return compiler_for(TOKENIZER)


def accepts(compiler: GrammarCompiler, wanted: OutputFormat, text: str) -> bool:
    """The whole text, and then the end."""
    constraint = compiler.output_format(wanted).make()
    return takes(constraint, [*ids_of(TOKENIZER, text), EOS_ID])


@pytest.mark.parametrize(
    ("kind", "value", "good", "bad"),
    [
        ("json_object", None, ['{"a":[1,{"b":null}]}', "{}"], ["[]", "1", '{"a":1', " {}"]),
        ("json_schema", CITY, ['{"city":"Paris"}', '{"city": "é\\n"}'], ["{}", '{"city":1}', '{"city":"x","n":1}']),
        ("regex", r"[a-c]{2,3}(/\d+)?", ["ab", "abc/12"], ["a", "abcd", "ab/"]),
        ("choice", ("yes", "no", 'may "be"', "ja/nein"), ["yes", 'may "be"', "ja/nein"], ["y", "yess", ""]),
        ("lark", 'start: "a" b*\nb: "b" | /[0-9]+/', ["a", "abb12"], ["b", "ac"]),
        ("gbnf", 'root ::= "x" digit+\ndigit ::= [0-9]', ["x1", "x123"], ["x", "1"]),
    ],
)
def test_each_kind_takes_what_it_says_and_nothing_else(
    compiler: GrammarCompiler, kind: str, value: Any, good: list[str], bad: list[str]
) -> None:
    wanted = OutputFormat(kind, value)
    for text in good:
        assert accepts(compiler, wanted, text), text
    for text in bad:
        assert not accepts(compiler, wanted, text), text


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("regex", "[a-"),
        ("regex", "(?=a)b"),
        ("regex", ""),
        ("regex", None),
        ("choice", ()),
        ("choice", ("a", 1)),
        ("choice", "yes"),
        ("lark", "start: missing_rule"),
        ("lark", 'start "x"'),
        ("gbnf", "root ::= (("),
        ("gbnf", 5),
        ("lark", "start: " + "x" * 1_000_001),
        ("xml", "<a/>"),
    ],
)
def test_a_grammar_that_cannot_be_read_is_refused_with_its_field(
    compiler: GrammarCompiler, kind: str, value: Any
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.output_format(OutputFormat(kind, value, param="structured_outputs.regex"))
    assert refused.value.param == "structured_outputs.regex"
    assert len(str(refused.value)) < 500


def test_a_second_use_of_a_schema_compiles_nothing(compiler: GrammarCompiler) -> None:
    first = compiler.output_format(OutputFormat("json_schema", CITY))
    second = compiler.output_format(OutputFormat("json_schema", dict(CITY)))
    assert compiler.num_compilations == 1
    one, other = first.make(), second.make()
    assert takes(one, ids_of(TOKENIZER, '{"city":"x"}'))
    assert allowed_ids(other) == set(ids_of(TOKENIZER, "{")), "the two share a state"
    assert compiler.num_compilations == 1


def test_a_second_use_of_tools_compiles_nothing(compiler: GrammarCompiler) -> None:
    envelope = Envelope(begin="call ", middle=": ", end="\n")
    compiler.request(None, (Tool("f", parameters=CITY),), ToolChoice("required"), envelope=envelope)
    num_once = compiler.num_compilations
    assert compiler.request(None, (Tool("f", parameters=dict(CITY)),), ToolChoice("required"), envelope=envelope)
    assert compiler.num_compilations == num_once


def test_threads_that_ask_for_the_same_schema_compile_it_once(compiler: GrammarCompiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        grammars = list(pool.map(lambda _: compiler.output_format(OutputFormat("json_schema", CITY)), range(32)))
    assert compiler.num_compilations == 1
    assert all(takes(g.make(), ids_of(TOKENIZER, '{"city"')) for g in grammars)


def test_the_cache_keeps_the_latest_and_no_failures() -> None:
    compiler = compiler_for(TOKENIZER, cache_size=2)
    for pattern in ("a", "b", "a", "c", "a"):
        compiler.output_format(OutputFormat("regex", pattern))
    assert compiler.num_compilations == 3
    compiler.output_format(OutputFormat("regex", "b"))  # the one that was used least lately had gone
    assert compiler.num_compilations == 4
    for _ in range(2):
        with pytest.raises(InvalidRequest):
            compiler.output_format(OutputFormat("regex", "["))
    assert compiler.num_compilations == 6


def test_a_tokenizer_without_a_fast_form_is_a_clear_refusal() -> None:
    compiler = GrammarCompiler.for_tokenizer(object(), vocab_size=10, eos_token_ids=[0])
    with pytest.raises(InvalidRequest, match="tokenizer") as refused:
        compiler.output_format(OutputFormat("json_object"))
    assert refused.value.code == "grammar_unavailable"


def test_masks_fit_a_vocabulary_larger_than_the_tokenizers() -> None:
    padded = compiler_for(TOKENIZER, TOKENIZER.get_vocab_size() + 100)
    constraint = padded.output_format(OutputFormat("json_object")).make()
    mask = constraint.allowed()
    assert mask is not None and mask.size == (TOKENIZER.get_vocab_size() + 100 + 31) // 32
    walked = ids_of(TOKENIZER, '{"a":"')
    assert takes(constraint, walked)
    assert max(allowed_ids(constraint)) < TOKENIZER.get_vocab_size()


def test_with_thinking_the_grammar_waits_for_the_end_of_the_reasoning(compiler: GrammarCompiler) -> None:
    markers = ReasoningTokens((TOKENIZER.token_to_id("<think>"),), (TOKENIZER.token_to_id("</think>"),), True)
    constraint = compiler.output_format(OutputFormat("choice", ("yes", "no"))).make(markers)
    assert isinstance(constraint, AfterReasoning)
    assert takes(constraint, ids_of(TOKENIZER, "whatever { it thinks </think>"))
    assert allowed_ids(constraint) == set(ids_of(TOKENIZER, "yn"))
    assert takes(constraint, ids_of(TOKENIZER, "no"))
    assert constraint.is_finished and allowed_ids(constraint) == {EOS_ID}


# -- whole requests ---------------------------------------------------------------------------------------------------

HARMONY = harmony.FORMAT.envelope
assert HARMONY is not None
ENVELOPE = Envelope(
    begin='<call>{"name": "', middle='", "arguments": ', end="}</call>", separator="\n", triggers=("<call>",)
)
TOOLS = (Tool("get_weather", parameters=CITY), Tool("now", parameters={"type": "object", "properties": {}}))
CALL = '<call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</call>'


def request_takes(compiler: GrammarCompiler, text: str, *args: Any, **options: Any) -> bool:
    compiled = compiler.request(*args, envelope=ENVELOPE, **options)
    assert compiled is not None
    return takes(compiled.make(), [*ids_of(TOKENIZER, text), EOS_ID])


def test_required_means_calls_and_nothing_else(compiler: GrammarCompiler) -> None:
    choice = ToolChoice("required")
    assert request_takes(compiler, CALL, None, TOOLS, choice)
    assert request_takes(compiler, CALL + "\n" + CALL, None, TOOLS, choice)
    assert request_takes(compiler, '<call>{"name": "now", "arguments": {}}</call>', None, TOOLS, choice)
    assert not request_takes(compiler, "Sure! " + CALL, None, TOOLS, choice)
    assert not request_takes(compiler, CALL + " done", None, TOOLS, choice)
    assert not request_takes(compiler, "", None, TOOLS, choice)
    assert not request_takes(compiler, CALL.replace("get_weather", "get_time"), None, TOOLS, choice)
    assert not request_takes(compiler, CALL.replace("city", "town"), None, TOOLS, choice)


def test_no_parallel_calls_means_exactly_one(compiler: GrammarCompiler) -> None:
    assert request_takes(compiler, CALL, None, TOOLS, ToolChoice("required"), is_parallel=False)
    assert not request_takes(compiler, CALL + "\n" + CALL, None, TOOLS, ToolChoice("required"), is_parallel=False)


def test_a_named_tool_is_the_only_one(compiler: GrammarCompiler) -> None:
    named = ToolChoice("named", "now")
    assert request_takes(compiler, '<call>{"name": "now", "arguments": {}}</call>', None, TOOLS, named)
    assert not request_takes(compiler, CALL, None, TOOLS, named)


def test_auto_is_free_unless_a_tool_is_strict(compiler: GrammarCompiler) -> None:
    assert compiler.request(None, TOOLS, ToolChoice("auto"), envelope=ENVELOPE) is None
    assert compiler.request(None, TOOLS, ToolChoice("none"), envelope=ENVELOPE) is None
    assert compiler.request(None, (), ToolChoice("auto"), envelope=ENVELOPE) is None


def test_auto_with_a_strict_tool_is_free_text_until_a_call_opens(compiler: GrammarCompiler) -> None:
    strict = (Tool("get_weather", parameters=CITY, strict=True),)
    for text in ("Just text, 1 < 2.", "", CALL, f"Let me look.\n{CALL}", f"{CALL}\n{CALL} There.", "<cal l>"):
        assert request_takes(compiler, text, None, strict), text
    for text in ("Hm <call>", "Hm <call>nothing</call>", CALL.replace("city", "town"), CALL.replace("weather", "time")):
        assert not request_takes(compiler, text, None, strict), text
    assert request_takes(compiler, f"Let me look.\n{CALL}", None, strict, is_parallel=False)
    assert not request_takes(compiler, CALL + CALL, None, strict, is_parallel=False)


def test_auto_with_an_output_format_is_the_document_or_calls(compiler: GrammarCompiler) -> None:
    for wanted, document in (
        (OutputFormat("json_schema", {"type": "object", "properties": {"ok": {"type": "boolean"}}}), '{"ok": true}'),
        (OutputFormat("choice", ("yes", "no")), "yes"),
        (OutputFormat("regex", "a/b+"), "a/bb"),
        (OutputFormat("lark", 'start: x\nx: "q"+'), "qqq"),
    ):
        assert request_takes(compiler, document, wanted, TOOLS)
        assert request_takes(compiler, CALL, wanted, TOOLS)
        assert not request_takes(compiler, "Text.", wanted, TOOLS)


def test_a_format_without_triggers_is_told_from_text_by_its_whole_opening(compiler: GrammarCompiler) -> None:
    strict = (Tool("get_weather", parameters=CITY, strict=True),)
    for envelope, call in (
        (Envelope('{"name": "', '", "parameters": ', "}"), '{"name": "get_weather", "parameters": {"city":"x"}}'),
        (Envelope("", "(", ")", open="[", close="]", style="python"), '[get_weather(city="x")]'),
    ):
        compiled = compiler.request(None, strict, envelope=envelope)
        assert compiled is not None
        for text, is_good in (
            (call, True),
            ("Text with [brackets] and {braces}.", True),
            ('{"weather": 1}', True),
            ("[1, 2]", True),
            (call.replace("city", "town"), False),
        ):
            assert takes(compiled.make(), [*ids_of(TOKENIZER, text), EOS_ID]) is is_good, text


def test_a_choice_that_cannot_be_forced_is_refused(compiler: GrammarCompiler) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.request(None, TOOLS, ToolChoice("required"), envelope=None)
    assert refused.value.param == "tool_choice"
    assert compiler.request(None, TOOLS, ToolChoice("auto"), envelope=None) is None
    document = compiler.request(OutputFormat("choice", ("yes", "no")), TOOLS, ToolChoice("auto"), envelope=None)
    assert document is not None and takes(document.make(), [*ids_of(TOKENIZER, "yes"), EOS_ID])


def test_a_strict_tool_with_an_unsupported_keyword_is_refused_and_another_is_noted(compiler: GrammarCompiler) -> None:
    odd = {"type": "object", "properties": {"a": {"type": "integer", "not": {"const": 1}}}, "required": ["a"]}
    with pytest.raises(InvalidRequest, match="'not' at properties.a") as refused:
        compiler.request(
            None, (TOOLS[0], Tool("odd", parameters=odd, strict=True)), ToolChoice("required"), envelope=ENVELOPE
        )
    assert refused.value.param == "tools.1.function.parameters"
    compiled = compiler.request(None, (Tool("odd", parameters=odd),), ToolChoice("required"), envelope=ENVELOPE)
    assert compiled is not None
    call = '<call>{"name": "odd", "arguments": {"a":%s}}</call>'
    assert takes(compiled.make(), [*ids_of(TOKENIZER, call % "1"), EOS_ID])
    assert not takes(compiled.make(), ids_of(TOKENIZER, call % '"text"'))


def test_a_document_beside_tools_is_refused_by_its_own_field(compiler: GrammarCompiler) -> None:
    wanted = OutputFormat("json_schema", {"allOf": [False]}, param="response_format.json_schema.schema")
    with pytest.raises(InvalidRequest, match="'allOf'") as refused:
        compiler.request(wanted, TOOLS, ToolChoice("auto"), envelope=ENVELOPE)
    assert refused.value.param == "response_format.json_schema.schema"


def test_harmony_calls_follow_the_reasoning_or_come_at_once() -> None:
    tokenizer = byte_tokenizer(special=HARMONY.special_tokens)
    compiler = compiler_for(tokenizer)
    strict = (Tool("now", parameters={"type": "object", "properties": {}, "additionalProperties": False}, strict=True),)
    reasoning = ReasoningTokens(
        tuple(ids_of(tokenizer, "<|channel|>analysis<|message|>")), tuple(ids_of(tokenizer, HARMONY.reasoning_end))
    )
    thought = "<|channel|>analysis<|message|>Hm, {<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}<|call|>"
    answer = "<|channel|>final<|message|>Noon."
    for choice, text, is_good in (
        (ToolChoice("required"), thought + call, True),
        (ToolChoice("required"), call, True),
        (ToolChoice("required"), thought + answer, False),
        (ToolChoice("required"), thought + call.replace("now", "then"), False),
        (ToolChoice("auto"), thought + call, True),
        (ToolChoice("auto"), thought + answer, True),
        (ToolChoice("auto"), answer, True),
        (ToolChoice("auto"), thought + call.replace("now", "then"), False),
        (ToolChoice("auto"), thought + call.replace("{}", '{"a":1}'), False),
    ):
        compiled = compiler.request(None, strict, choice, envelope=HARMONY)
        assert compiled is not None
        assert takes(compiled.make(reasoning), ids_of(tokenizer, text)) is is_good, text


def test_a_tokenizer_may_have_added_tokens_that_the_model_does_not_know() -> None:
    tokenizer = byte_tokenizer(special=("<known>", "<loc0001>", "<loc0002>"))
    compiler = compiler_for(tokenizer, tokenizer.token_to_id("<known>") + 1)
    constraint = compiler.output_format(OutputFormat("choice", ("yes", "no"))).make()
    assert takes(constraint, [*ids_of(tokenizer, "yes"), tokenizer.token_to_id(EOS)])


def test_special_tokens_of_an_envelope_are_named_by_id() -> None:
    tokenizer = byte_tokenizer(special=("<tool_call>", "</tool_call>", "<other>"))
    compiler = compiler_for(tokenizer)
    envelope = Envelope(
        begin='<tool_call>\n{"name": "', middle='", "arguments": ', end="}\n</tool_call>", triggers=("<tool_call>",)
    )
    strict = (Tool("now", parameters={"type": "object", "properties": {}, "additionalProperties": False}, strict=True),)
    compiled = compiler.request(None, strict, envelope=envelope)
    assert compiled is not None
    constraint = compiled.make()
    text = 'Hi <other> there\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    ids = ids_of(tokenizer, text)
    assert tokenizer.token_to_id("<tool_call>") in ids and text_of(tokenizer, ids) == text
    assert takes(constraint, ids)
    assert is_allowed(constraint.allowed(), tokenizer.token_to_id(EOS))
