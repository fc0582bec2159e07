"""How the service joins grammars, parsers and budgets: which constraint reaches the engine, and when it begins."""

import json

import pytest
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel

from tests.fakes import MARKERS, SPECIAL_TOKENS, ByteTokenizer, FakeEngine, fake_service
from tests.grammars import takes
from vllm_mlx.engine.constraint import Guide
from vllm_mlx.engine.step import FinishReason
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.detokenizer import byte_alphabet
from vllm_mlx.generation.events import collect
from vllm_mlx.generation.grammar import GrammarCompiler
from vllm_mlx.generation.request import (
    ChatMessage,
    GenerationRequest,
    OutputFormat,
    ReasoningOptions,
    SamplingOverrides,
    TextPart,
    Tool,
    ToolChoice,
)
from vllm_mlx.parsers.tools import harmony
from vllm_mlx.settings import ParsingSettings, Settings

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Bonn", "Ulm"]}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER = Tool("weather", "Says it.", SCHEMA, strict=True)
CLOCK = Tool("clock", "Says it.", {"type": "object", "properties": {}}, strict=True)
FAKE = ByteTokenizer()


def compiler_over(fake):
    """The compiler over the ids of a ByteTokenizer."""
    tokenizer = Tokenizer(models.BPE(vocab={c: b for c, b in byte_alphabet().items()}, merges=[]))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.add_tokens(list(MARKERS))
    tokenizer.add_special_tokens([t.content for i, t in sorted(fake.added_tokens_decoder.items())])
    assert all(tokenizer.token_to_id(t.content) == i for i, t in fake.added_tokens_decoder.items())
    ends = [fake.id_of("<|im_end|>"), fake.id_of("<|endoftext|>")]
    return GrammarCompiler(tokenizer.to_str, vocab_size=len(fake), eos_token_ids=ends)


@pytest.fixture(scope="module")
def grammar():
    return compiler_over(FAKE)


def ask(**fields):
    return GenerationRequest(id="r", messages=(ChatMessage("user", (TextPart("Hi"),)),), **fields)


async def constraint_of(grammar, request, reply="x"):
    engine = FakeEngine(reply=reply)
    message = await collect(fake_service(engine, grammar=grammar).generate(request))
    make = engine.requests[0].make_constraint
    return (make() if make is not None else None), message


def accepts(constraint, text):
    return takes(constraint, FAKE.encode(text))


async def test_an_output_format_constrains_the_answer_from_its_start(grammar):
    wanted = OutputFormat("json_schema", SCHEMA)
    off = ReasoningOptions(enabled=False)
    assert accepts((await constraint_of(grammar, ask(output_format=wanted, reasoning=off)))[0], '{"city": "Bonn"}')
    assert not accepts((await constraint_of(grammar, ask(output_format=wanted, reasoning=off)))[0], '{"city": "Köln"}')
    assert not accepts((await constraint_of(grammar, ask(output_format=wanted, reasoning=off)))[0], "<think>")


async def test_with_thinking_the_constraint_begins_behind_the_reasoning(grammar):
    wanted = OutputFormat("json_schema", SCHEMA)
    for text in ('<think>anything {"</think>{"city": "Ulm"}', '{"city": "Ulm"}'):
        assert accepts((await constraint_of(grammar, ask(output_format=wanted)))[0], text)
    open_prompt = ask(output_format=wanted, template_kwargs={"open_thinking": True})
    assert accepts((await constraint_of(grammar, open_prompt))[0], 'free words</think>{"city": "Ulm"}')
    assert not accepts((await constraint_of(grammar, open_prompt))[0], "free words</think>more")


async def test_completions_are_constrained_too(grammar):
    engine = FakeEngine()
    request = GenerationRequest(id="r", prompt="Say:", output_format=OutputFormat("choice", ("yes", "no")))
    await collect(fake_service(engine, grammar=grammar).generate(request))
    assert accepts(engine.requests[0].make_constraint(), "yes")
    assert not accepts(engine.requests[0].make_constraint(), "maybe")


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {json.dumps(arguments)}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("choice", "text", "is_allowed"),
    [
        (ToolChoice("required"), call("weather", {"city": "Ulm"}), True),
        (ToolChoice("required"), call("clock", {}), True),
        (ToolChoice("required"), "Hello", False),
        (ToolChoice("named", "weather"), call("weather", {"city": "Ulm"}), True),
        (ToolChoice("named", "weather"), call("clock", {}), False),
        (ToolChoice("auto"), "Hello", True),
        (ToolChoice("auto"), "Well. " + call("weather", {"city": "Ulm"}), True),
        (ToolChoice("auto"), call("weather", {"city": "Rome"}), False),
    ],
)
async def test_the_tool_choice_is_enforced_on_the_tokens(grammar, choice, text, is_allowed):
    request = ask(tools=(WEATHER, CLOCK), tool_choice=choice, reasoning=ReasoningOptions(enabled=False))
    constraint, message = await constraint_of(grammar, request, reply=text)
    assert accepts(constraint, text) == is_allowed
    if is_allowed:
        assert message.finished.reason == ("tool_calls" if "<tool_call>" in text else "stop")


async def test_nothing_is_constrained_without_a_reason(grammar):
    loose = Tool("weather", "", SCHEMA)
    for fields in ({}, {"tools": (loose,)}, {"tools": (WEATHER,), "tool_choice": ToolChoice("none")}):
        assert (await constraint_of(grammar, ask(**fields)))[0] is None


async def test_an_unsupported_keyword_is_refused_before_anything_runs(grammar):
    schema = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    service = fake_service(grammar=grammar)
    with pytest.raises(InvalidRequest, match="not"):
        await collect(service.generate(ask(output_format=OutputFormat("json_schema", schema))))
    assert service.num_live == 0


async def test_a_server_without_grammars_refuses_rather_than_ignores():
    for fields, param in (
        ({"output_format": OutputFormat("json_object")}, "response_format"),
        ({"tools": (WEATHER,), "tool_choice": ToolChoice("required")}, "tool_choice"),
    ):
        with pytest.raises(InvalidRequest) as caught:
            await collect(fake_service().generate(ask(**fields)))
        assert caught.value.param == param


async def test_an_answer_cut_by_the_limit_does_not_pretend_to_be_whole(grammar):
    request = ask(output_format=OutputFormat("json_schema", SCHEMA), max_tokens=5)
    _, message = await constraint_of(grammar, request, reply='{"city": "Bonn"}')
    assert (message.text, message.finished.reason) == ('{"cit', "length")


async def test_the_end_is_ignored_when_asked_unless_a_grammar_ends_the_answer(grammar):
    ends = {FAKE.id_of("<|im_end|>"), FAKE.id_of("<|endoftext|>")}
    ignoring = SamplingOverrides(ignore_eos=True)
    for fields, expected in (
        ({}, ends),
        ({"sampling": ignoring}, set()),
        ({"sampling": ignoring, "stop_token_ids": (7,)}, {7}),
        ({"sampling": ignoring, "output_format": OutputFormat("json_object")}, ends),
    ):
        engine = FakeEngine()
        await collect(fake_service(engine, grammar=grammar).generate(ask(**fields)))
        assert engine.requests[0].stop_token_ids == expected


async def test_a_shaped_answer_that_something_else_ended_is_cut(grammar):
    wanted = OutputFormat("json_schema", SCHEMA)
    off = ReasoningOptions(enabled=False)
    for ends_with, fields, is_cut in (
        (FinishReason.REPETITION, {"output_format": wanted}, True),
        (FinishReason.LENGTH, {"output_format": wanted}, True),
        (FinishReason.STOP, {"output_format": wanted}, False),
        (FinishReason.REPETITION, {}, False),
    ):
        engine = FakeEngine(reply='{"city"', ends_with=ends_with)
        message = await collect(fake_service(engine, grammar=grammar).generate(ask(reasoning=off, **fields)))
        assert message.finished.is_cut is is_cut


async def test_an_answer_that_ends_within_a_call_is_cut(grammar):
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Bo'
    loose = (Tool("weather", "Says it.", SCHEMA),)
    engine = FakeEngine(reply=call, ends_with=FinishReason.REPETITION)
    message = await collect(fake_service(engine, grammar=grammar).generate(ask(tools=loose)))
    assert message.tool_calls[0].name == "weather" and message.finished.is_cut


async def harmony_guide(reply="x", **fields):
    """(tokenizer, the guide of the request that reached the engine, the message)"""
    tokenizer = ByteTokenizer(extra=harmony.FORMAT.envelope.special_tokens)
    engine = FakeEngine(tokenizer, reply=reply)
    parsing = ParsingSettings(reasoning_parser="harmony", tool_call_parser="harmony")
    service = fake_service(engine, settings=Settings(parsing=parsing), grammar=compiler_over(tokenizer))
    message = await collect(service.generate(ask(reasoning=ReasoningOptions(max_tokens=3), **fields)))
    return tokenizer, Guide.of(engine.requests[0]), message


def think(tokenizer, guide, thought):
    """Feed thoughts up to the cap, and then what is forced; returns that."""
    for token in tokenizer.encode(f"<|channel|>analysis<|message|>{thought}"):
        assert guide.forced() is None
        guide.accept(token)
    forced = []
    while (token := guide.forced()) is not None:
        guide.accept(token)
        forced.append(token)
    assert guide.failure is None
    return tokenizer.decode(forced)


@pytest.mark.parametrize("choice", [ToolChoice("required"), ToolChoice("auto")], ids=["required", "auto"])
async def test_a_cap_on_thinking_leads_into_a_call_where_answers_have_a_channel_of_their_own(choice):
    tokenizer, guide, _ = await harmony_guide(tools=(CLOCK,), tool_choice=choice)
    assert think(tokenizer, guide, "hm.") == "<|end|><|start|>assistant"
    call = "<|channel|>commentary to=functions.clock <|constrain|>json<|message|>{}<|call|>"
    assert takes(guide.constraint, tokenizer.encode(call))


async def test_a_cap_on_thinking_leads_into_the_channel_of_answers_and_a_document(grammar):
    tokenizer, guide, _ = await harmony_guide(output_format=OutputFormat("choice", ("yes", "no")))
    assert think(tokenizer, guide, "hm.") == "<|end|><|start|>assistant<|channel|>final<|message|>"
    assert takes(guide.constraint, tokenizer.encode("yes"))


async def test_a_call_behind_the_thoughts_is_no_reasoning():
    call = "<|end|><|start|>assistant<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{}<|call|>"
    reply = f"<|channel|>analysis<|message|>hm{call}"
    tokenizer, guide, message = await harmony_guide(reply, tools=(Tool("weather", "Says it.", SCHEMA),))
    assert message.finished.usage.num_reasoning_tokens == 2 and message.tool_calls
    for token in tokenizer.encode(reply):
        assert guide.forced() is None
        guide.accept(token)
