"""Arguments of tool calls as Lark, written from the tool's schema in the style of an envelope.

JSON arguments are one inline schema. The other styles (tags, Python, Gemma) are written value by value; a keyword that
cannot be written so raises `Unwritable`, or, when the schema is not strict, is left out with a note. Worker threads.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mlx.generation.tool_grammar import LarkWriter, any_of, join
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import Envelope

_IGNORED = frozenset(
    "title description default examples example $comment deprecated readOnly writeOnly $schema $id $defs definitions "
    "format strict x-guidance nullable".split()
)
_HANDLED: Mapping[str, frozenset[str]] = {
    "object": frozenset({"type", "properties", "required", "additionalProperties"}),
    "array": frozenset({"type", "items", "minItems", "maxItems"}),
    "boolean": frozenset({"type"}),
    "null": frozenset({"type"}),
    "any": frozenset({"type", "properties", "required", "items"}),
}
_NUMBER = frozenset({"type", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"})
_STRING = frozenset({"type", "minLength", "maxLength", "pattern"})


class Unwritable(Exception):
    """A keyword of the schema cannot be enforced in this style."""

    def __init__(self, keyword: str) -> None:
        super().__init__(keyword)
        self.keyword = keyword


def json_rule(schema: Mapping[str, Any], style: Mapping[str, Any]) -> str:
    return "%json " + json.dumps({**schema, "x-guidance": dict(style)})


class ArgumentWriter:
    """Writes one tool's arguments. `notes` collects what was left out."""

    def __init__(
        self,
        writer: LarkWriter,
        envelope: Envelope,
        schema: Mapping[str, Any],
        *,
        is_strict: bool,
        json_style: Mapping[str, Any],
    ) -> None:
        self._writer = writer
        self._envelope = envelope
        self._root = schema
        self._is_strict = is_strict
        self._json_style = {**json_style, **({} if is_strict else {"lenient": True})}
        self._references: dict[str, str] = {}
        self._any = ""
        self.notes: list[str] = []

    def write(self) -> str:
        """A Lark expression for the arguments."""
        if self._envelope.style == "json":
            return self._writer.add("arguments", json_rule(self._root, self._json_style))
        schema = self._dereferenced(self._root)
        self._check(schema, _HANDLED["object"])
        properties = schema.get("properties")
        if not isinstance(properties, Mapping):
            properties = {}
        required = schema.get("required", ())
        if self._envelope.style == "tags":
            items = [(self._tagged(name, child), name in required) for name, child in properties.items()]
            parts = [item if is_required else f"({item})?" for item, is_required in items]
            return self._writer.add("arguments", join(*parts))
        equals = "=" if self._envelope.style == "python" else ":"
        items = [(join(json.dumps(k + equals), self._value(v)), k in required) for k, v in properties.items()]
        return self._writer.add("arguments", self._listed(items))

    # -- tags ---------------------------------------------------------------------------------------------------------

    def _tagged(self, name: str, schema: Any) -> str:
        e, text = self._envelope, self._writer.text
        schema = self._dereferenced(schema if isinstance(schema, Mapping) else {})
        types = ToolSpec("", {**self._root, "properties": {name: schema}}).types_of(name)
        is_text = not types or "string" in types
        middle = e.parameter_middle.replace("{is_string}", "true" if is_text else "false")
        head = text(e.parameter_begin + name + middle)
        choices = _choices(schema)
        if is_text and choices is not None and all(isinstance(c, str) for c in choices):
            return join(head, any_of([text(choice) or '""' for choice in choices]), text(e.parameter_end))
        if is_text:
            if types == {"string"}:
                self._check(schema, frozenset({"type"}))
            marks = (
                e.parameter_begin,
                e.parameter_end,
                *e.begin.splitlines(),
                *e.end.splitlines(),
                *e.close.splitlines(),
            )
            without = sorted({mark.strip() for mark in marks})  # a parser may take them for the end of the value
            return join(head, self._writer.text_until(e.parameter_end, without))
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        value = json_rule({**definitions, **schema}, self._json_style)
        return join(head, self._writer.add("value", value), text(e.parameter_end))

    # -- Python and Gemma ---------------------------------------------------------------------------------------------

    def _value(self, schema: Any) -> str:
        if not isinstance(schema, Mapping):
            return self._any_value()
        reference = schema.get("$ref")
        if isinstance(reference, str):
            if reference not in self._references:
                self._references[reference] = name = self._writer.add("reference")
                self._writer.define(name, self._value(self._dereferenced(schema)))
            return self._references[reference]
        choices = _choices(schema)
        if choices is not None:
            return any_of([self._literal(choice) for choice in choices])
        for keyword in ("anyOf", "oneOf", "allOf"):
            branches = schema.get(keyword)
            if isinstance(branches, list) and branches:
                if keyword != "anyOf" and len(branches) > 1:
                    self._refuse(keyword)
                self._check(schema, frozenset({keyword}))
                return any_of([self._value(branch) for branch in branches])
        kinds = schema.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else list(kinds)
        if not kinds:
            kinds = ["object"] if "properties" in schema else ["array"] if "items" in schema else []
        return any_of([self._typed(kind, schema) for kind in kinds]) if kinds else self._any_value()

    def _typed(self, kind: str, schema: Mapping[str, Any]) -> str:
        allowed = _STRING if kind == "string" else _NUMBER if kind in ("number", "integer") else _HANDLED.get(kind)
        if allowed is None:
            raise Unwritable("type")
        others = frozenset().union(*_HANDLED.values(), _NUMBER, _STRING)
        self._check(schema, others if isinstance(schema.get("type"), list) else allowed)
        own = {key: value for key, value in schema.items() if key in allowed} | {"type": kind}
        match kind:
            case "null" | "boolean":
                return any_of([self._literal(word) for word in ((None,) if kind == "null" else (True, False))])
            case "number" | "integer":
                return self._writer.add("number", json_rule(own, self._json_style))
            case "string":
                return self._string(own)
            case "array":
                return self._array(own)
            case _:
                return self._object(own)

    def _string(self, schema: Mapping[str, Any]) -> str:
        if self._envelope.style == "python":
            style = {**self._json_style, "json_allowed_escapes": 'nrbtf\\"u'}
            return self._writer.add("string", json_rule(schema, style))
        self._check(schema, frozenset({"type"}))
        quote = self._envelope.quote
        return join(self._writer.text(quote), self._writer.text_until(quote))

    def _array(self, schema: Mapping[str, Any]) -> str:
        item = self._writer.add("item", self._value(schema.get("items", {})))
        least, most = int(schema.get("minItems", 0)), schema.get("maxItems")
        if most is not None and int(most) <= 0:
            return '"[]"'
        repeats = f"{{{max(least - 1, 0)},{'' if most is None else int(most) - 1}}}"
        items = f"{item} ({self._separator()} {item}){repeats}"
        return f'"[" {items} "]"' if least > 0 else f'"[" ({items})? "]"'

    def _object(self, schema: Mapping[str, Any]) -> str:
        properties = schema.get("properties")
        if not isinstance(properties, Mapping) or not properties:
            return self._any_object()
        required = schema.get("required", ())
        items = [(join(self._key(name), self._value(child)), name in required) for name, child in properties.items()]
        return f'"{{" {self._listed(items)} "}}"'

    def _listed(self, items: Sequence[tuple[str, bool]]) -> str:
        """Items in order with separators between; those that are not required may be missing."""
        add = self._writer.add
        behind, first = "", ""
        for expression, is_required in reversed(items):
            item = add("item", expression)
            alone = join(item, behind)
            first = alone if is_required else any_of([alone, first or '""'])
            behind_item = join(self._separator(), item)
            behind = add("more", join(behind_item if is_required else f"({behind_item})?", behind))
            first = add("listed", first)
        return first

    def _separator(self) -> str:
        return '","' if self._envelope.style == "gemma" else '", "'

    def _key(self, name: str) -> str:
        return json.dumps(f"{name}:") if self._envelope.style == "gemma" else json.dumps(json.dumps(name) + ": ")

    def _literal(self, value: Any) -> str:
        python = self._envelope.style == "python"
        match value:
            case None | bool():
                return json.dumps(str(value) if python else json.dumps(value))
            case str() if python:
                return json.dumps(json.dumps(value, ensure_ascii=False))
            case str():
                return self._writer.text(self._envelope.quote + value + self._envelope.quote)
            case int() | float():
                return json.dumps(json.dumps(value))
            case list():
                return join('"["', f" {self._separator()} ".join(map(self._literal, value)), '"]"')
            case _:
                items = [join(self._key(key), self._literal(child)) for key, child in value.items()]
                return join('"{"', f" {self._separator()} ".join(items), '"}"')

    def _any_value(self) -> str:
        if not self._any:
            self._any = name = self._writer.add("anything")
            scalars = [self._literal(word) for word in (None, True, False)]
            number = self._writer.add("number", json_rule({"type": "number"}, self._json_style))
            array = f'"[" ({name} ({self._separator()} {name})*)? "]"'
            self._writer.define(name, any_of([*scalars, number, self._string({}), array, self._any_object()]))
        return self._any

    def _any_object(self) -> str:
        value = self._any_value() if not self._any else self._any
        if self._envelope.style == "gemma":
            pair = f'/[A-Za-z_][A-Za-z0-9_]*/ ":" {value}'
        else:
            pair = f'{self._string({"type": "string"})} ": " {value}'
        return f'"{{" ({pair} ({self._separator()} {pair})*)? "}}"'

    # -- schemas ------------------------------------------------------------------------------------------------------

    def _dereferenced(self, schema: Mapping[str, Any]) -> Mapping[str, Any]:
        """The schema a chain of references leads to; what stands beside `$ref` is joined to it."""
        for _ in range(20):
            reference = schema.get("$ref")
            if not isinstance(reference, str):
                return schema
            node: Any = self._root
            for part in reference.removeprefix("#").strip("/").split("/"):
                part = part.replace("~1", "/").replace("~0", "~")
                node = node.get(part) if isinstance(node, Mapping) and part else node
            if not reference.startswith("#") or not isinstance(node, Mapping):
                raise Unwritable("$ref")
            schema = {**node, **{key: value for key, value in schema.items() if key != "$ref"}}
        raise Unwritable("$ref")

    def _check(self, schema: Mapping[str, Any], handled: frozenset[str]) -> None:
        for keyword in schema:
            if keyword not in handled and keyword not in _IGNORED:
                self._refuse(keyword)
        if schema.get("additionalProperties") not in (None, True, False, {}):
            self._refuse("additionalProperties")

    def _refuse(self, keyword: str) -> None:
        if self._is_strict:
            raise Unwritable(keyword)
        note = f"{keyword!r} is not enforced"
        if note not in self.notes:
            self.notes.append(note)


def _choices(schema: Mapping[str, Any]) -> list[Any] | None:
    if "const" in schema:
        return [schema["const"]]
    choices = schema.get("enum")
    return choices if isinstance(choices, list) and choices else None
