"""Reads calls whose parameters stand in tags, each value as plain text, and writes them as JSON while they come.

What a value is, its schema says: strings are streamed, everything else is collected and converted (`schema.coerce`).
Without a schema, a value that reads as JSON is JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Markers, Steps
from vllm_mlx.parsers.schema import ToolSpec, coerce, is_text
from vllm_mlx.parsers.tool_parser import ToolParser
from vllm_mlx.parsers.values import read_value

_MAX_HEAD = 1000
_ATTRIBUTE = re.compile(r"([\w:.-]+)\s*=\s*(\"[^\"]*\"|'[^']*'|[^\s\"'>]+)")
_EXPECTED = re.compile(
    r"(?:string=(?:true|false)|type=(?:string|number|integer|boolean|object|array|null)|index=\d+)\Z"
)
_NAME = re.compile(r"[\w.:/-]+\Z")
_SPACE = re.compile(r"\s")
_MAY_BE_JSON = frozenset('{["-+.0123456789tfnTFN')


@dataclass(frozen=True, slots=True)
class TagStyle:
    """`<function=NAME>` or `<function name="NAME">`, then parameters in tags of their own, then the end tag.

    `function` and `parameter` are the tags without their attributes and `>`. `value_ends`: what ends a value although
    its end tag was forgotten (read again afterwards). `has_lines`: a value stands on lines of its own. `outer_ends`:
    what ends a function although its end tag was forgotten. All arguments may also be one JSON object, between the
    `json_block` tags if the style has them.
    """

    function: str
    function_end: str
    parameter: str
    parameter_end: str
    value_ends: tuple[str, ...] = ()
    outer_ends: tuple[str, ...] = ()
    head_end: str = ">"
    function_attribute: str = "name"
    parameter_attribute: str = "name"
    json_block: str = ""
    json_block_end: str = ""
    has_lines: bool = False
    has_cdata: bool = False


@dataclass(frozen=True, slots=True)
class PairStyle:
    """NAME, then for each argument a key in one pair of tags and its value in another."""

    key: str
    key_end: str
    value: str
    value_end: str
    outer_end: str


QWEN = TagStyle(
    function="<function",
    function_end="</function>",
    parameter="<parameter",
    parameter_end="</parameter>",
    value_ends=("\n<parameter=", "\n</function>\n</tool_call>", "</function>\n</tool_call>"),
    outer_ends=("</tool_call>",),
    has_lines=True,
)
GLM = PairStyle("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "</tool_call>")


def read_function_blocks(p: ToolParser, style: TagStyle) -> Steps[None]:
    """One function block after the other, as long as they come."""
    yield from p.skip_space()
    yield from p.expect(style.function)
    while True:
        yield from read_function_block(p, style)
        yield from p.skip_space()
        if (yield from p.accept(style.function)) is None:
            return


def read_function_block(p: ToolParser, style: TagStyle) -> Steps[None]:
    """The rest of a function block, behind its tag's name."""
    name, _ = yield from _read_head(p, style.function_attribute, style.head_end)
    writer = p.begin_call(name)
    tool = p.tools.get(p.known_name(name))
    yield from p.skip_space()
    if style.json_block:
        yield from p.accept(style.json_block)
    if (yield from p.peek()) == "{":
        yield from read_value(p, writer)
        yield from _end_block(p, style)
        return
    writer.begin_object()
    inside = Markers((style.parameter, style.function_end, *style.outer_ends))
    while True:
        yield from p.skip_space()
        found = yield from p.until(inside, p.say_text, trim=True)
        if found is None:
            raise Broken(f"the text ended before {style.function_end!r}")
        if found != style.parameter:
            break
        yield from _read_parameter(p, writer, style, tool)
    writer.end()
    if found != style.function_end:
        p.unread(found)
    p.end_call()


def _end_block(p: ToolParser, style: TagStyle) -> Steps[None]:
    p.end_call()
    if style.json_block_end:
        yield from p.skip_space()
        yield from p.accept(style.json_block_end)
    yield from p.read_close(style.function_end, *style.outer_ends, unread=style.outer_ends)


def _read_head(p: ToolParser, attribute: str, end: str) -> Steps[tuple[str, dict[str, str]]]:
    """What a tag says about itself, up to its `>`: `=NAME`, or `name="NAME"` among attributes."""
    head, _ = yield from p.collect_until(end, limit=_MAX_HEAD)
    attributes: dict[str, str] = {}
    if head.startswith("="):
        name = head[1:].strip().strip("\"'")
    else:
        ignored = [_ATTRIBUTE.sub("", head).strip()]
        for match in _ATTRIBUTE.finditer(head):
            key, value = match[1], match[2].strip("\"'")
            if key not in attributes and (key == attribute or _EXPECTED.match(f"{key}={value}")):
                attributes[key] = value
            else:
                ignored.append(match[0])
        if any(ignored):
            p.note(f"ignored {' '.join(filter(None, ignored))!r} in a tag")
        name = attributes.get(attribute, "").replace("&quot;", '"').replace("&amp;", "&")
    if not name or "<" in name or "\n" in name:
        raise Broken("a tag without a name")
    return name, attributes


def _read_parameter(p: ToolParser, w: JsonWriter, style: TagStyle, tool: ToolSpec | None) -> Steps[None]:
    key, attributes = yield from _read_head(p, style.parameter_attribute, style.head_end)
    w.key(key)
    if attributes.get("string") == "true" or attributes.get("type") == "string":
        types = frozenset({"string"})
    else:
        types = tool.types_of(key) if tool else frozenset()
        if attributes.get("string") == "false" or "type" in attributes:
            types -= {"string"}  # the tag knows better than the schema
    ends = [style.parameter_end, *style.value_ends]
    if style.has_lines:
        ends.append("\n" + style.parameter_end)
        yield from p.accept("\n")
    if style.has_cdata:
        yield from p.skip_space()
        if (yield from p.accept("<![CDATA[")) is not None:
            yield from read_text_value(p, w, types, ("]]>",))
            yield from p.skip_space()
            yield from p.expect(style.parameter_end)
            return
    found = yield from read_text_value(p, w, types, tuple(ends))
    if found in style.value_ends:
        p.unread(found)


def read_text_value(p: ToolParser, w: JsonWriter, types: frozenset[str], ends: tuple[str, ...]) -> Steps[str]:
    """A value as plain text up to one of `ends`, which is consumed and returned."""
    markers = Markers(ends)
    is_streamed = is_text(types)
    lead = ""
    if not types:
        lead = yield from p.take_while(_SPACE)
        is_streamed = (yield from p.peek()) not in _MAY_BE_JSON and (yield from p.looking_at(*ends)) is None
    if is_streamed:
        w.begin_string()
        w.text(lead)
        found = yield from p.until(markers, w.text)
        if found is not None:
            w.end_string()
    else:
        parts = [lead]
        found = yield from p.until(markers, parts.append)
        w.literal(coerce("".join(parts), types))
    if found is None:
        raise Broken(f"the text ended before {ends[0]!r}")
    return found


def read_pairs(p: ToolParser, style: PairStyle) -> Steps[None]:
    """NAME and its pairs; the closing tag is left for the caller."""
    name, found = yield from p.collect_until("\n", style.key, style.outer_end, limit=_MAX_HEAD)
    name = name.strip()
    if not _NAME.match(name):
        raise Broken(f"{name[:40]!r} is not a tool's name")
    writer = p.begin_call(name)
    tool = p.tools.get(p.known_name(name))
    if found != "\n":
        p.unread(found)
    yield from p.skip_space()
    if (yield from p.peek()) == "{":
        yield from read_value(p, writer)
        p.end_call()
        return
    writer.begin_object()
    while (yield from p.accept(style.key)) is not None:
        key, _ = yield from p.collect_until(style.key_end)
        writer.key(key.strip())
        yield from p.skip_space()
        yield from p.expect(style.value)
        types = tool.types_of(key.strip()) if tool else frozenset()
        yield from read_text_value(p, writer, types, (style.value_end,))
        yield from p.skip_space()
    if p.is_at_end:
        raise Broken(f"the text ended before {style.outer_end!r}")
    writer.end()
    p.end_call()
