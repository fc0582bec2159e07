"""The official JSON-Schema test suite: every schema gives valid documents or a 400 that names the keyword.

The documents are made by the real sampler, 32 rows with different schemas in a batch, from random logits.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import mlx.core as mx
import numpy as np
import pytest

from tests.grammars import EOS, allowed_ids, byte_tokenizer, compiler_for, ids_of, takes, text_of
from vllm_mlx.engine.constraint import Guide, prepare_guides
from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.engine.sampler import BatchSampler, SamplingRow
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.grammar import CompiledGrammar, GrammarCompiler
from vllm_mlx.generation.json_schema import find_keyword, prepared_schema, subschemas
from vllm_mlx.generation.request import OutputFormat

SUITE = Path(__file__).parent.parent / "data" / "json_schema_suite" / "schemas.json"
VALIDATORS = {"draft2020-12": jsonschema.Draft202012Validator, "draft7": jsonschema.Draft7Validator}
TOKENIZER = byte_tokenizer(merges=('","', '":', "true", "null", "foo", "bar"))
VOCAB = 320  # larger than the tokenizer's, as models pad theirs
MAX_TOKENS = 600


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return compiler_for(TOKENIZER, VOCAB)


def generate(grammars: list[CompiledGrammar], *, num_rows: int = 32) -> list[str | None]:
    """One document per grammar, from random logits at temperature 1.5; None where the limit came first.

    Rows join as others finish, so the batch is always made of different schemas at different places.
    """
    eos = TOKENIZER.token_to_id(EOS)
    documents: list[str | None] = [None] * len(grammars)
    waiting = deque(range(len(grammars)))
    running: list[tuple[int, SamplingRow, list[int]]] = []
    rng = np.random.default_rng(0)
    leaning = np.zeros(VOCAB, dtype=np.float32)  # or random strings would be hundreds of characters long
    leaning[[i for text, i in TOKENIZER.get_vocab().items() if text[0] in '"}],']] = 6.0
    leaning[eos] = 6.0
    batch_sampler = BatchSampler()
    while waiting or running:
        while waiting and len(running) < num_rows:
            index = waiting.popleft()
            params = SamplingParams(temperature=1.5, top_p=0.999 if index % 2 else 1.0, seed=index)
            row = SamplingRow(params, vocab_size=VOCAB, seed=0, guide=Guide(grammars[index].make()))
            running.append((index, row, []))
        prepare_guides([row.guide for _, row, _ in running])
        logits = rng.standard_normal((len(running), VOCAB)).astype(np.float32) * 2 + leaning
        batch = batch_sampler.sample(mx.array(logits), [row for _, row, _ in running])
        still = []
        for (index, row, ids), (token, _) in zip(running, batch.collect(), strict=True):
            assert row.guide is not None
            row.guide.accept(token)
            if token == eos:
                documents[index] = text_of(TOKENIZER, ids)
            elif len(ids) < MAX_TOKENS:
                still.append((index, row, [*ids, token]))
        assert not any(batch.row_errors), batch.row_errors
        running = still
    return documents


def test_the_official_suite_gives_valid_documents_or_a_named_refusal(compiler: GrammarCompiler) -> None:
    suite = json.loads(SUITE.read_text(encoding="utf-8"))
    compiled: list[tuple[Mapping[str, Any], CompiledGrammar]] = []
    num_refused = 0
    for entry in suite:
        try:
            compiled.append((entry, compiler.output_format(OutputFormat("json_schema", entry["schema"]))))
        except InvalidRequest as error:
            num_refused += 1
            assert error.param == "response_format"
            text = str(error)
            assert not isinstance(entry["schema"], dict) or any(
                f"'{key}'" in text and find_keyword(entry["schema"], key) is not None for key in text.split("'")[1::2]
            ), (entry["name"], text)
    assert len(suite) > 500 and len(compiled) > 300

    documents = generate([grammar for _, grammar in compiled])
    unfinished = [entry["name"] for (entry, _), document in zip(compiled, documents, strict=True) if document is None]
    wrong = []
    for (entry, _), document in zip(compiled, documents, strict=True):
        if document is not None and not is_valid(entry, document):
            wrong.append((entry["draft"], entry["name"], document))
    assert not wrong
    assert len(unfinished) <= len(compiled) // 50, unfinished


def is_valid(entry: Mapping[str, Any], document: str) -> bool:
    draft, schema = entry["draft"], entry["schema"]
    if "$schema" not in schema and has_siblings_of_ref(schema):
        draft = "draft2020-12"  # as we read a schema that does not say: drafts up to 7 ignored what stands beside $ref
    return bool(VALIDATORS[draft](schema).is_valid(json.loads(document)))


def has_siblings_of_ref(schema: Mapping[str, Any]) -> bool:
    return ("$ref" in schema and len(schema) > 1) or any(has_siblings_of_ref(s) for _, _, s in subschemas(schema))


# One of each kind of thing that schemas in the wild are made of.
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "format": "email"},
        "born": {"type": "string", "format": "date"},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "integer"},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
PARTS: list[dict[str, Any]] = [
    {"type": "string", "enum": ["red", "green", 'quo"ted', "ünï"]},
    {"const": {"a": [1, None, True]}},
    {"type": "integer", "exclusiveMinimum": -5, "maximum": 1000},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "integer", "multipleOf": 7},
    {"type": "string", "pattern": "^[A-Z]{2,3}-[0-9]{1,4}$"},
    {"type": "string", "maxLength": 8},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["string", "null"], "maxLength": 5},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "array", "items": {"type": "integer", "maximum": 9, "minimum": 0}, "minItems": 1, "maxItems": 4},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 3}]},
    {"oneOf": [{"type": "boolean"}, {"type": "array", "items": {"type": "null"}, "maxItems": 3}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 30}]},
    {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}}, "additionalProperties": False},
    PERSON,
    TREE,
]


def made_up_schemas() -> list[dict[str, Any]]:
    """230 schemas: every part alone, in an array, nested, and all pairs of neighbours in objects."""
    schemas = list(PARTS)
    for i, part in enumerate(PARTS):
        definitions = {"$defs": part["$defs"]} if "$defs" in part else {}
        schemas.append({**definitions, "type": "array", "items": part, "maxItems": 2})
        schemas.append(
            {
                "type": "object",
                "properties": {
                    "format": part,
                    "deep": {"type": "object", "properties": {"pattern": part}, "required": ["pattern"]},
                },
                "required": ["deep"],
                "additionalProperties": False,
                **definitions,
            }
        )
        for step in range(1, 8):
            other = PARTS[(i + step) % len(PARTS)]
            definitions = {"$defs": TREE["$defs"]} if TREE in (part, other) else {}
            properties = {"a": part, "b": other, "c": {"anyOf": [part, other]}}
            schemas.append(
                {
                    "type": "object",
                    "properties": properties,
                    "required": ["a", "b"][: step % 3],
                    "additionalProperties": False,
                    **definitions,
                }
            )
    return schemas


def test_documents_of_made_up_schemas_are_valid(compiler: GrammarCompiler) -> None:
    schemas = made_up_schemas()
    assert len(schemas) >= 200
    grammars = [compiler.output_format(OutputFormat("json_schema", schema)) for schema in schemas]
    documents = generate(grammars)
    wrong = [
        (schema, document)
        for schema, document in zip(schemas, documents, strict=True)
        if document is not None and not jsonschema.Draft202012Validator(schema).is_valid(json.loads(document))
    ]
    assert not wrong
    assert documents.count(None) <= len(schemas) // 50


def test_a_document_cut_by_the_limit_is_a_beginning_and_nothing_more(compiler: GrammarCompiler) -> None:
    constraint = compiler.output_format(OutputFormat("json_schema", PERSON)).make()
    for token in ids_of(TOKENIZER, '{"name":"Ada","a'):
        constraint.accept(token)
    assert not constraint.is_finished
    assert TOKENIZER.token_to_id(EOS) not in allowed_ids(constraint)


@pytest.mark.parametrize(
    ("schema", "keyword", "path"),
    [
        ({"not": {"type": "null"}}, "not", ""),
        ({"properties": {"a": {"items": {"uniqueItems": True}}}}, "uniqueItems", "properties.a.items"),
        ({"anyOf": [{}, {"if": {}, "then": {}}]}, "if", "anyOf.1"),
        ({"contains": {}}, "contains", ""),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired", ""),
        ({"type": "string", "pattern": "^(?=a)b"}, "pattern", ""),
        ({"oneOf": [{"minimum": 2}, {"maximum": 5}]}, "oneOf", ""),
        ({"$ref": "https://example.com/elsewhere.json"}, "$ref", ""),
        ({"$ref": "#/$defs/missing"}, "$ref", ""),
    ],
)
def test_what_cannot_be_enforced_is_refused_by_name(
    compiler: GrammarCompiler, schema: dict[str, Any], keyword: str, path: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.output_format(OutputFormat("json_schema", schema, param="response_format.json_schema.schema"))
    assert f"'{keyword}'" in str(refused.value) and path in str(refused.value)
    assert refused.value.param == "response_format.json_schema.schema"
    assert refused.value.code == "unsupported_schema_keyword"


@pytest.mark.parametrize(
    ("schema", "named"),
    [
        ({"allOf": [True, False]}, "'allOf' can be met by no document"),
        ({"type": "object", "properties": {"a": False}, "required": ["a"]}, "'properties' and 'required'"),
        ({"allOf": [{"$ref": "#/$defs/no"}], "$defs": {"no": False, "other": {"enum": []}}}, "'$ref' at allOf.0"),
        ({"type": "string", "title": "T", "enum": [1]}, "'type' and 'enum'"),
        ({"allOf": [{}, {"type": "array", "minItems": 3, "maxItems": 2}]}, "'minItems' and 'maxItems' at allOf.1"),
        ({"properties": {"a": {"anyOf": [{}, {"type": "text"}]}}}, "'type' at properties.a.anyOf.1"),
        ({"title": "T", "properties": {"a": 5}}, "'properties' cannot be used"),
        ({"$schema": "http://127.0.0.1/none", "type": "object"}, "'$schema'"),
    ],
)
def test_a_schema_that_is_wrong_is_refused_with_the_keywords_that_make_it_so(
    compiler: GrammarCompiler, schema: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        compiler.output_format(OutputFormat("json_schema", schema))
    assert named in str(refused.value) and refused.value.param == "response_format"


def test_looking_for_what_is_wrong_in_a_large_schema_has_an_end(compiler: GrammarCompiler) -> None:
    large = {f"p{i}": {"type": "string", "description": "x" * 500} for i in range(1500)}
    schema: dict[str, Any] = {"properties": {**large, "last": {"type": "text"}}}
    for name in ("inner", "outer"):
        schema = {"properties": {name: schema}}
    with pytest.raises(InvalidRequest) as refused:
        compiler.output_format(OutputFormat("json_schema", schema))
    path = "properties.outer.properties.inner"
    assert f"'properties' at {path} cannot be used: Invalid type: text" in str(refused.value)


@pytest.mark.parametrize("schema", [[], True, "object", None, 5])
def test_a_schema_is_an_object(compiler: GrammarCompiler, schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="must be an object"):
        compiler.output_format(OutputFormat("json_schema", schema))


def test_a_schema_of_a_megabyte_or_of_two_hundred_levels_is_refused(compiler: GrammarCompiler) -> None:
    deep: dict[str, Any] = {"type": "string"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidRequest, match="levels") as refused:
        compiler.output_format(OutputFormat("json_schema", deep))
    assert refused.value.param == "response_format"
    with pytest.raises(InvalidRequest, match="characters"):
        compiler.output_format(OutputFormat("json_schema", {"enum": ["x" * 1000] * 1100}))


def test_unknown_formats_are_annotations_and_noted(compiler: GrammarCompiler) -> None:
    schema = {"type": "object", "properties": {"format": {"type": "string", "format": "color"}}}
    prepared, notes = prepared_schema(schema, param="response_format")
    assert prepared["properties"]["format"] == {"type": "string"}
    assert notes == ("format 'color' at properties.format is not enforced",)
    assert schema["properties"]["format"]["format"] == "color"  # type: ignore[index]
    assert compiler.output_format(OutputFormat("json_schema", schema)).notes == notes


def test_integers_have_sixty_four_bits_where_the_schema_does_not_say(compiler: GrammarCompiler) -> None:
    def takes_number(schema: dict[str, Any], text: str) -> bool:
        constraint = compiler.output_format(OutputFormat("json_schema", schema)).make()
        return takes(constraint, [*ids_of(TOKENIZER, text), TOKENIZER.token_to_id(EOS)])

    most, more = str(2**63 - 1), str(2**63)
    for schema in ({"type": "integer"}, {"type": ["integer", "null"]}, {"type": "integer", "minimum": 0}):
        assert takes_number(schema, most) and not takes_number(schema, more)
    for schema in ({"type": "integer"}, {"type": "integer", "minimum": -(2**63), "maximum": 2**63 - 1}):
        assert takes_number(schema, str(-(2**63 - 1024))) and not takes_number(schema, "-" + more + "0")
    assert takes_number({"type": ["integer", "number"]}, more)
    assert takes_number({"oneOf": [{"type": "integer"}, {"type": "null"}]}, more)


def test_clients_cannot_set_the_compilers_own_options() -> None:
    schema = {"type": "string", "x-guidance": {"lenient": True, "whitespace_flexible": True}}
    assert prepared_schema(schema, param="response_format")[0] == {"type": "string"}


def test_json_has_no_white_space_but_one_space_after_separators(compiler: GrammarCompiler) -> None:
    def takes_text(text: str) -> bool:
        return takes(compiler.output_format(OutputFormat("json_object")).make(), ids_of(TOKENIZER, text))

    assert takes_text('{"a":1,"b":[1,2]}')
    assert takes_text('{"a": 1, "b": [1, 2]}')
    assert not takes_text('{"a":  1')
    assert not takes_text("{\n")
