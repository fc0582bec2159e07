"""Reads a call written as a JSON object, `{"name": ..., "arguments": {...}}`, in the spellings models use: either order
of the keys, other words for them, one more level of `function`, arguments as a string. Arguments are streamed as soon
as the name is known."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Steps
from vllm_mlx.parsers.tool_parser import ToolParser
from vllm_mlx.parsers.values import JSON, read_key, read_value, read_whole_string, to_json

NAME_KEYS = frozenset({"name", "tool_name", "function", "function_name", "tool"})
ARGUMENT_KEYS = frozenset({"arguments", "parameters", "args", "input"})
ID_KEYS = frozenset({"id", "tool_call_id", "call_id"})
_WRAPPERS = frozenset({"function", "tool", "tool_call", "function_call"})


@dataclass(slots=True)
class _Fields:
    """What is known of the call being read."""

    has_ids: bool
    name: str | None = None
    id: str | None = None
    is_begun: bool = False
    early_arguments: list[str] = field(default_factory=list)


def read_json_calls(p: ToolParser, *, is_bare: bool = False, has_ids: bool = True) -> Steps[None]:
    """One call object, or an array of them.

    `is_bare`: no marker said that this is a call, so its keys and the name must say it, or it is Broken without a word.
    `has_ids`: ids in the objects are worth passing on, even when they are mere numbers.
    """
    yield from p.skip_space()
    if (yield from p.accept("[")) is None:
        yield from _read_call(p, is_bare, has_ids)
        return
    yield from p.skip_space()
    if is_bare and (yield from p.peek()) != "{":
        raise Broken("")
    while (yield from p.accept("]")) is None:
        yield from _read_call(p, is_bare, has_ids)
        yield from p.skip_space()
        if (yield from p.expect(",", ";", "]")) == "]":
            break
        yield from p.skip_space()
    p.settle()


def read_bare_json_calls(p: ToolParser) -> Steps[None]:
    """JSON calls that no marker announces, perhaps in a code fence, one behind the other or separated by `;`."""
    yield from p.skip_space()
    fence = yield from p.accept("```json", "```")
    yield from read_json_calls(p, is_bare=True)
    if fence is not None:
        yield from p.skip_space()
        yield from p.accept("```")
        p.settle()
    yield from p.skip_space()
    while (yield from p.accept(";", ",")) is not None or (yield from p.peek()) == "{":
        yield from read_json_calls(p, is_bare=True)
        yield from p.skip_space()


def _read_call(p: ToolParser, is_bare: bool, has_ids: bool) -> Steps[None]:
    yield from p.skip_space()
    if (yield from p.accept("{")) is None:
        raise Broken("" if is_bare else "expected a JSON object")
    fields = _Fields(has_ids)
    yield from _read_members(p, fields, is_bare, levels_left=2)
    if not fields.is_begun:
        if fields.name is None:
            raise Broken("" if is_bare else "the object has no name")
        writer = p.begin_call(fields.name, fields.id)
        writer.literal("".join(fields.early_arguments) or "{}")
    p.end_call()


def read_named_call(
    p: ToolParser, name: str, id: str | None = None, *, empty_before: tuple[str, ...] = ()
) -> Steps[None]:
    """The arguments object of a call whose name stood before it. Before one of `empty_before` there may be none."""
    yield from p.skip_space()
    if (yield from p.peek()) == "{":
        yield from read_value(p, p.begin_call(name, id))
        p.end_call()
    elif empty_before and (yield from p.looking_at(*empty_before)) is not None:
        p.begin_call(name, id)
        p.end_call()
    else:
        raise Broken("the text ended before the arguments" if p.is_at_end else "expected the arguments' '{'")


def _read_members(p: ToolParser, fields: _Fields, is_bare: bool, levels_left: int) -> Steps[None]:
    """The members of an object and its closing brace."""
    yield from p.skip_space()
    while (yield from p.accept("}")) is None:
        key = yield from read_key(p)
        yield from p.skip_space()
        first = yield from p.peek()
        if key in _WRAPPERS and first == "{" and levels_left:
            p.skip(1)
            yield from _read_members(p, fields, is_bare, levels_left - 1)
        elif key in NAME_KEYS and first in ('"', "'") and fields.name is None:
            fields.name = yield from read_whole_string(p)
            if is_bare and p.known_name(fields.name) not in p.tools:
                raise Broken("")
        elif key in ARGUMENT_KEYS and not fields.is_begun and not fields.early_arguments:
            yield from _read_arguments(p, fields, first)
        elif key in ID_KEYS and first in ('"', "'") and not fields.is_begun:
            id = yield from read_whole_string(p)
            fields.id = id if fields.has_ids or not id.isdigit() else None
        elif is_bare and key != "type" and not fields.is_begun:
            raise Broken("")
        else:
            yield from _skip_member(p, key)
        yield from p.skip_space()
        if (yield from p.expect(",", "}")) == "}":
            return
        yield from p.skip_space()


def _read_arguments(p: ToolParser, fields: _Fields, first: str) -> Steps[None]:
    if first == "{":
        if fields.name is not None:
            fields.is_begun = True
            yield from read_value(p, p.begin_call(fields.name, fields.id))
        else:
            yield from read_value(p, JsonWriter(fields.early_arguments.append))
        return
    if first in ('"', "'"):
        text = (yield from read_whole_string(p)).strip()
    else:
        parts: list[str] = []
        yield from read_value(p, JsonWriter(parts.append))
        text = "".join(parts)
    document = "{}" if text in ("", "null") else to_json(text, JSON)
    if document is None or not document.startswith("{"):
        raise Broken("the arguments are not an object")
    fields.early_arguments.append(document)


def _skip_member(p: ToolParser, key: str) -> Steps[None]:
    parts: list[str] = []
    yield from read_value(p, JsonWriter(parts.append))
    value = "".join(parts)
    if (key, value) != ("type", '"function"'):
        p.note(f"ignored {key!r} in a tool call: {value}")
