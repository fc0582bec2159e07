"""What a request's tools say about their arguments, as far as a parser must know: which tools exist, and whether a
value written without quotes is text, a number or a structure. No validation: that is for whoever runs the tool."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.parsers.values import to_json

_MAX_REFERENCES = 20
_STRUCTURES = frozenset({"object", "array"})


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool of the request: its name, and a JSON Schema object for its arguments."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    @property
    def parameter_names(self) -> tuple[str, ...]:
        properties = self.parameters.get("properties")
        return tuple(properties) if isinstance(properties, Mapping) else ()

    def types_of(self, parameter: str) -> frozenset[str]:
        """JSON types the parameter may have; empty when the schema does not say."""
        properties = self.parameters.get("properties")
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return _types(schema, self.parameters, _MAX_REFERENCES)


def _types(schema: Any, root: Mapping[str, Any], references_left: int) -> frozenset[str]:
    if not isinstance(schema, Mapping) or references_left <= 0:
        return frozenset()
    if isinstance(schema.get("$ref"), str):
        return _types(_resolve(schema["$ref"], root), root, references_left - 1)
    kind = schema.get("type")
    if isinstance(kind, str):
        return frozenset({kind})
    if isinstance(kind, list):
        return frozenset(k for k in kind if isinstance(k, str))
    if isinstance(schema.get("enum"), list):
        return frozenset(_type_of(v) for v in schema["enum"])
    if "const" in schema:
        return frozenset({_type_of(schema["const"])})
    for word in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(word), list):
            kinds = [_types(s, root, references_left - 1) for s in schema[word]]
            return frozenset().union(*kinds) if word == "allOf" or all(kinds) else frozenset()
    if "properties" in schema:
        return frozenset({"object"})
    return frozenset({"array"}) if "items" in schema else frozenset()


def _resolve(reference: str, root: Mapping[str, Any]) -> Any:
    node: Any = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        node = node.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(node, Mapping) else None
    return node


def _type_of(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case _:
            return "object"


def is_text(types: frozenset[str]) -> bool:
    """Whatever stands there is a string; it can be passed on as it comes."""
    return types == {"string"}


def coerce(text: str, types: frozenset[str]) -> str:
    """The JSON for a value that was written without quotes, by the types its schema allows.

    Text that fits no allowed type stays text: the tool's own validation will say so better than we could.
    """
    bare = text.strip()
    as_json = to_json(bare) if bare else None
    if not types:
        return as_json if as_json is not None and not as_json.startswith('"') else _string(text)
    if as_json is not None and _kind(as_json) in _widened(types):
        # `"quoted"` for a string parameter is the model's quoting, unless quotes are all the schema allows for.
        return as_json if not as_json.startswith('"') or bare.startswith('"') else _string(text)
    word = bare.lower()
    if "null" in types and word in ("null", "none", "nil"):
        return "null"
    if "boolean" in types and word in ("true", "false"):
        return word
    if "boolean" in types and "integer" not in types and word in ("0", "1"):
        return "true" if word == "1" else "false"
    if as_json is not None and as_json.startswith('"') and "string" not in types:
        return coerce(str(json.loads(as_json)), types)  # a number or structure in quotes
    if types == {"object"} and not bare:
        return "{}"
    if types == {"array"} and not bare:
        return "[]"
    return _string(text)


def _widened(types: frozenset[str]) -> frozenset[str]:
    return types | {"integer"} if "number" in types else types


def _kind(document: str) -> str:
    match document[0]:
        case '"':
            return "string"
        case "{":
            return "object"
        case "[":
            return "array"
        case "t" | "f":
            return "boolean"
        case "n":
            return "null"
        case _:
            return "number" if any(c in document for c in ".eE") else "integer"


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
