"""JSON schemas of clients: checked, made fit for the grammar compiler, and its complaints made fit for clients.

JSON is generated compact, or with the one space after `:` and `,` that models are used to: white space without bounds
lets weak models write newlines for ever. So do digits: an integer without bounds gets those of 64 bits, which is what
readers of JSON take. Worker threads; pure functions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llguidance import LLMatcher

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.checks import check_schema
from vllm_mlx.generation.schema_blame import blamed

JSON_STYLE: Mapping[str, Any] = {"whitespace_flexible": False, "key_separator": ": ?", "item_separator": ", ?"}

_KNOWN_FORMATS = frozenset(
    "date-time time date duration email hostname ipv4 ipv6 uuid uri".split()  # those llguidance enforces
)
_SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_SCHEMA_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = (
    "items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames",
    "unevaluatedItems", "unevaluatedProperties", "additionalItems",
)  # fmt: skip
_LEAST, _MOST = -(2**63 - 1024), 2**63 - 1  # the compiler reads bounds as doubles: this is the one above -2**63
_EXCLUDING = ("oneOf", "not", "if")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
_UNKNOWN_KEYWORDS = "Unimplemented keys: "
_UNSATISFIABLE = "Unsatisfiable schema: "


def schema_source(schema: Mapping[str, Any], style: Mapping[str, Any] = JSON_STYLE) -> str:
    return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=dict(style))


def prepared_schema(schema: Any, *, param: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A client's schema checked and made fit for the compiler, and what was dropped from it."""
    if not isinstance(schema, Mapping):
        raise InvalidRequest("A JSON schema must be an object.", param=param)
    check_schema(schema, param)
    notes: list[str] = []
    prepared = _prepare(schema, "", notes, can_narrow=True)
    prepared.pop("x-guidance", None)  # the compiler's own options are not for clients to set
    return prepared, tuple(notes)


def _prepare(schema: Mapping[str, Any], path: str, notes: list[str], *, can_narrow: bool) -> dict[str, Any]:
    """`can_narrow` is false in branches of `oneOf`: what a narrower branch leaves out would then be another's alone."""
    prepared = _bounded(schema) if can_narrow else dict(schema)
    if "format" in prepared and prepared["format"] not in _KNOWN_FORMATS:
        notes.append(f"format {prepared['format']!r} at {path or 'the top'} is not enforced")
        del prepared["format"]
    for key in _COUNTS:
        if isinstance(prepared.get(key), float) and prepared[key].is_integer():
            prepared[key] = int(prepared[key])  # 2.0 is an integer in JSON Schema
    for key, place, child in subschemas(schema):
        child_path = f"{path}.{key}{'' if place is None else f'.{place}'}".lstrip(".")
        new = _prepare(child, child_path, notes, can_narrow=can_narrow and key not in _EXCLUDING)
        if place is None:
            prepared[key] = new
        else:
            if prepared[key] is schema[key]:
                prepared[key] = dict(schema[key]) if isinstance(schema[key], Mapping) else list(schema[key])
            prepared[key][place] = new
    return prepared


def _bounded(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema, with bounds where it describes integers of any number of digits."""
    kinds = schema.get("type")
    kinds = kinds if isinstance(kinds, list) else [kinds]
    bounded = dict(schema)
    if "integer" not in kinds or "number" in kinds or schema.keys() & {"multipleOf", "enum", "const"}:
        return bounded
    if not schema.keys() & {"minimum", "exclusiveMinimum"} or schema.get("minimum") == -(2**63):
        bounded["minimum"] = _LEAST
    if not schema.keys() & {"maximum", "exclusiveMaximum"}:
        bounded["maximum"] = _MOST
    return bounded if _is_in_order(bounded) else dict(schema)


def _is_in_order(schema: Mapping[str, Any]) -> bool:
    low, high = (
        [schema[key] for key in keys if isinstance(schema.get(key), int | float)]
        for keys in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum"))
    )
    return not low or not high or max(low) < min(high)


def subschemas(schema: Mapping[str, Any]) -> Iterator[tuple[str, Any, Mapping[str, Any]]]:
    """(keyword, place in it or None, schema) of the schemas directly inside; what is not an object is passed over."""
    for key in _SCHEMAS:
        if isinstance(schema.get(key), Mapping):
            yield key, None, schema[key]
    for key in (*_SCHEMA_LISTS, "items"):
        if isinstance(schema.get(key), list):
            yield from ((key, i, child) for i, child in enumerate(schema[key]) if isinstance(child, Mapping))
    for key in _SCHEMA_MAPS:
        if isinstance(schema.get(key), Mapping):
            yield from ((key, name, child) for name, child in schema[key].items() if isinstance(child, Mapping))


def find_keyword(schema: Mapping[str, Any], keyword: str, path: str = "") -> str | None:
    """Path of the first subschema that uses a keyword; the empty path is the schema itself."""
    if keyword in schema:
        return path
    for key, place, child in subschemas(schema):
        found = find_keyword(child, keyword, f"{path}.{key}{'' if place is None else f'.{place}'}".lstrip("."))
        if found is not None:
            return found
    return None


def refusal(message: str, source: str, param: str) -> InvalidRequest:
    """The compiler's complaint as one sentence that names what to change."""
    line = first_line(message)
    schema = _schema_in(source)
    if line.startswith(_UNKNOWN_KEYWORDS):
        keywords = [k.strip().strip('"') for k in line[len(_UNKNOWN_KEYWORDS) :].strip("[]").split(",")]
        return unsupported(keywords, schema, param)
    if schema is None:
        return InvalidRequest(f"The grammar cannot be used: {line}.", param=param, code="invalid_grammar")
    path, found = blamed(schema, _complaint, subschemas)
    if not found:
        return InvalidRequest(f"The schema cannot be used: {line}.", param=param, code="invalid_schema")
    about = _listed(found) + (f" at {path}" if path else "")
    if line.startswith(_UNSATISFIABLE):
        text = f"In the schema {about} can be met by no document: {line.removeprefix(_UNSATISFIABLE)}."
        return InvalidRequest(text, param=param, code="invalid_schema")
    if "oneOf" in found and "oneOf" in line:
        return _not_enforced(f"{about} with branches that may both hold", param)
    text = f"In the schema {about} cannot be used: {line}."
    return InvalidRequest(text, param=param, code="unsupported_schema_keyword")


def _complaint(schema: Mapping[str, Any]) -> str:
    error = LLMatcher.validate_grammar(schema_source(schema))
    return first_line(error) if error else ""


def unsupported(keywords: Sequence[str], schema: Mapping[str, Any] | None, param: str) -> InvalidRequest:
    path = find_keyword(schema, keywords[0]) if schema is not None else ""
    words = _listed(keywords) + (f" at {path}" if path else "")
    if path is None:  # not in the client's own text, so in a metaschema it refers to
        words = f"a '$ref' to a schema with {words}"
    return _not_enforced(words, param)


def _not_enforced(words: str, param: str) -> InvalidRequest:
    return InvalidRequest(
        f"The schema uses {words}, which cannot be enforced while generating; leave it out.",
        param=param,
        code="unsupported_schema_keyword",
    )


def _listed(keywords: Sequence[str]) -> str:
    *others, last = map(repr, keywords)
    return f"{', '.join(others)} and {last}" if others else last


def _schema_in(source: str) -> Mapping[str, Any] | None:
    """The schema inside a serialised grammar that is just one schema."""
    try:
        schema = json.loads(source)["grammars"][0]["json_schema"]
    except (ValueError, KeyError, IndexError, TypeError):
        return None
    return schema if isinstance(schema, Mapping) else None


def first_line(message: object) -> str:
    lines = [line.strip() for line in str(message).splitlines() if line.strip()]
    text = lines[0] if lines else "unknown error"
    if text.endswith("regex parse error:"):
        text = " ".join([text, *(line for line in lines[1:] if line.startswith("error:"))])
    return (text if len(text) <= 300 else text[:300] + "...").rstrip(".")
