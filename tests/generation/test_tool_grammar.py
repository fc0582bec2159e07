"""Grammar and parser of every tool format agree: what the one allows, the other reads as the calls that were meant."""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import Any

import jsonschema
import pytest

from tests.grammars import EOS, byte_tokenizer, compiler_for, ids_of, random_walk, takes
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import Tool, ToolChoice
from vllm_mlx.parsers import pipeline, tools
from vllm_mlx.parsers.events import ParserEvent, TextDelta, ToolCallDelta, ToolCallStarted
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import Envelope

FORMATS = {
    module.name: importlib.import_module(f"{tools.__name__}.{module.name}").FORMAT
    for module in pkgutil.iter_modules(tools.__path__)
}
ENVELOPES: dict[str, Envelope] = {name: f.envelope for name, f in FORMATS.items() if f.envelope is not None}

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 0, "maximum": 50},
        "unit": {"enum": ["c", "f"]},
        "at": {"type": "array", "items": {"type": "number"}, "maxItems": 3},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "filter": {
            "type": "object",
            "properties": {"count": {"type": "integer"}, "either": {"type": ["boolean", "null"]}},
            "required": ["count"],
            "additionalProperties": False,
        },
        "next": {"$ref": "#/$defs/link"},
    },
    "required": ["filter"],
    "additionalProperties": False,
    "$defs": {
        "link": {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "more": {"type": "array", "items": {"type": "null"}}},
            "required": ["id"],
            "additionalProperties": False,
        }
    },
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = tuple(
    Tool(name, parameters=schema, strict=True)
    for name, schema in (("get_weather", WEATHER), ("find_all", NESTED), ("now", NOTHING))
)
SPECS = [ToolSpec(tool.name, tool.parameters) for tool in TOOLS]


def calls_and_text(events: list[ParserEvent]) -> tuple[list[tuple[str, Any]], str]:
    calls: list[list[str]] = []
    text = ""
    for event in events:
        match event:
            case ToolCallStarted():
                calls.append([event.name, ""])
            case ToolCallDelta():
                calls[event.index][1] += event.arguments
            case TextDelta():
                text += event.text
    return [(name, json.loads(arguments or "{}")) for name, arguments in calls], text


def walk(name: str, choice: ToolChoice, *, has_tokens: bool, seed: int) -> str | None:
    """A random answer; with `has_tokens` the format's markers are special tokens of the vocabulary."""
    envelope = ENVELOPES[name]
    tokenizer = byte_tokenizer(special=envelope.special_tokens if has_tokens else ())
    compiled = compiler_for(tokenizer).request(None, TOOLS, choice, envelope=envelope)
    assert compiled is not None
    constraint, begun = compiled.make(), ""
    if choice.mode == "auto":
        begun = "Let me see. " if envelope.triggers else ""
        begun += f"{(envelope.open + envelope.begin).lstrip()}find_all{':0' * envelope.is_counted}{envelope.middle}"
        assert takes(constraint, ids_of(tokenizer, begun))
    closers = (envelope.quote, envelope.parameter_end, envelope.end, envelope.close, '"')
    rest = random_walk(constraint, tokenizer, seed, closers=closers)
    return None if rest is None else begun + rest


@pytest.mark.parametrize("has_tokens", [True, False], ids=["tokens", "text"])
@pytest.mark.parametrize("name", ENVELOPES)
def test_what_the_grammar_allows_the_parser_reads(name: str, has_tokens: bool) -> None:
    schemas = {tool.name: tool.parameters for tool in TOOLS}
    num_read = 0
    for seed, choice in enumerate([ToolChoice("required"), ToolChoice("named", "get_weather"), ToolChoice("auto")] * 2):
        answer = walk(name, choice, has_tokens=has_tokens, seed=seed)
        if answer is None:
            continue
        parser = pipeline.build(tool_format=name, tools=SPECS)
        calls, text = calls_and_text([*parser.feed(answer), *parser.finish()])
        num_read += len(calls)
        assert calls, answer
        for called, arguments in calls:
            jsonschema.validate(arguments, schemas[called])
        if choice.mode == "named":
            assert [called for called, _ in calls] == ["get_weather"], answer
        if choice.mode != "auto":
            assert not text.strip(), answer
    assert num_read > 0


def test_every_format_but_auto_has_an_envelope() -> None:
    assert set(FORMATS) - set(ENVELOPES) == {"auto"}


PYTHON = Envelope(begin="", middle="(", end=")", open="[", close="]", separator=", ", style="python")
TAGS = Envelope(
    begin="<f=", middle=">", end="</f>", style="tags", parameter_begin="<p=", parameter_middle=">", parameter_end="</p>"
)
GEMMA = Envelope(begin="call:", middle="{", end="}", style="gemma", quote='<"')


def allows(envelope: Envelope, schema: dict[str, Any], text: str, *, strict: bool = True) -> bool:
    tokenizer = byte_tokenizer()
    tool = Tool("f", parameters=schema, strict=strict)
    compiled = compiler_for(tokenizer).request(None, (tool,), ToolChoice("required"), envelope=envelope)
    assert compiled is not None
    return takes(compiled.make(), [*ids_of(tokenizer, text), tokenizer.token_to_id(EOS)])


VALUES: dict[str, Any] = {
    "type": "object",
    "properties": {
        "s": {"type": "string"},
        "n": {"type": ["integer", "null"], "maximum": 9},
        "b": {"type": "boolean"},
        "l": {"type": "array", "items": {"anyOf": [{"const": "x"}, {"const": 2}]}, "minItems": 1, "maxItems": 2},
        "o": {"type": "object", "properties": {"k": {"type": "number"}}, "required": ["k"]},
        "any": {},
    },
    "required": ["n"],
}


@pytest.mark.parametrize(
    ("envelope", "text", "is_good"),
    [
        (PYTHON, "[f(n=1)]", True),
        (PYTHON, "[f(n=None)]", True),
        (PYTHON, '[f(s="a\\"b", n=3, b=True, l=["x", 2], o={"k": 1.5}, any={"z": [None, 1]})]', True),
        (PYTHON, '[f(n=1, l=["x"]), f(n=2)]', True),
        (PYTHON, "[f()]", False),
        (PYTHON, "[f(n=10)]", False),
        (PYTHON, "[f(n=null)]", False),
        (PYTHON, "[f(b=True, n=1)]", False),
        (PYTHON, "[f(n=1, l=[])]", False),
        (PYTHON, '[f(n=1, l=["y"])]', False),
        (PYTHON, '[f(n=1, l=["x", 2, 2])]', False),
        (GEMMA, "call:f{n:1}", True),
        (GEMMA, 'call:f{s:<"any "quotes"<",n:null,b:false,l:[<"x<",2],o:{k:2}}', True),
        (GEMMA, 'call:f{s:"plain",n:1}', False),
        (GEMMA, "call:f{s:1,n:1}", False),
        (TAGS, "<f=f><p=s>any\n<text></p><p=n>4</p><p=b>true</p><p=any>x</p></f>", True),
        (TAGS, '<f=f><p=n>null</p><p=l>["x",2]</p><p=o>{"k": 1}</p></f>', True),
        (TAGS, "<f=f><p=s>x</p></f>", False),
        (TAGS, "<f=f><p=n>ten</p></f>", False),
        (TAGS, "<f=f><p=n>1</p><p=zzz>1</p></f>", False),
    ],
)
def test_values_in_styles_other_than_json(envelope: Envelope, text: str, is_good: bool) -> None:
    assert allows(envelope, VALUES, text) is is_good


def test_a_recursive_schema_is_written_once() -> None:
    tree = {
        "type": "object",
        "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#"}}},
        "required": ["v"],
    }
    schema = {
        "type": "object",
        "properties": {"t": {"$ref": "#/$defs/tree"}},
        "required": ["t"],
        "$defs": {
            "tree": {
                **tree,
                "properties": {**tree["properties"], "kids": {"type": "array", "items": {"$ref": "#/$defs/tree"}}},
            }
        },
    }  # type: ignore[dict-item]
    assert allows(PYTHON, schema, '[f(t={"v": 1, "kids": [{"v": 2, "kids": [{"v": 3}]}]})]')
    assert not allows(PYTHON, schema, '[f(t={"v": 1, "kids": [{"w": 2}]})]')


@pytest.mark.parametrize("envelope", [PYTHON, GEMMA, TAGS], ids=["python", "gemma", "tags"])
def test_a_keyword_that_a_style_cannot_write_is_refused_for_strict_tools_only(envelope: Envelope) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"s": {"type": "string"}},
        "patternProperties": {"^x": {"type": "integer"}},
    }
    with pytest.raises(InvalidRequest, match="'patternProperties'") as refused:
        allows(envelope, schema, "")
    assert refused.value.param == "tools.0.function.parameters"
    good = {PYTHON: '[f(s="1")]', GEMMA: 'call:f{s:<"1<"}', TAGS: "<f=f><p=s>1</p></f>"}[envelope]
    assert allows(envelope, schema, good, strict=False)


def test_a_tag_value_cannot_hold_what_ends_it() -> None:
    schema = {"type": "object", "properties": {"s": {"type": "string"}}, "required": ["s"]}
    assert allows(TAGS, schema, "<f=f><p=s>a < b </q></p></f>")
    assert not allows(TAGS, schema, "<f=f><p=s>a </f> b</p></f>")
