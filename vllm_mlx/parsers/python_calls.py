"""Reads calls written as Python: `[get_weather(city="Paris", days=2), now()]`, or one call a line without brackets."""

from __future__ import annotations

import re

from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Steps
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import ToolParser
from vllm_mlx.parsers.values import PYTHON, read_value

_WORD = re.compile(r"\w")
_NAME = re.compile(r"[\w.-]")


def read_python_calls(p: ToolParser, *, is_bare: bool = False) -> Steps[None]:
    """Calls in brackets, or calls one after another until something else comes.

    `is_bare`: no marker said that these are calls, so a list whose first name is no tool's is Broken without a word.
    """
    yield from p.skip_space()
    in_brackets = (yield from p.accept("[")) is not None
    if is_bare and not in_brackets:
        raise Broken("")
    while True:
        yield from p.skip_space()
        if in_brackets and (yield from p.accept("]")) is not None:
            break
        yield from read_python_call(p, is_bare=is_bare)
        yield from p.skip_space()
        if in_brackets:
            if (yield from p.expect(",", "]")) == "]":
                break
        else:
            yield from p.accept(",", ";")
            yield from p.skip_space()
            if not _WORD.match((yield from p.peek())):
                return
    p.settle()


def read_python_call(p: ToolParser, *, is_bare: bool = False) -> Steps[None]:
    name = yield from p.take_while(_NAME)
    if (yield from p.accept("(")) is None or not name or (is_bare and p.known_name(name) not in p.tools):
        raise Broken("" if is_bare else "expected a function call")
    name = name.removesuffix(".call") if p.known_name(name) not in p.tools else name
    writer = p.begin_call(name)
    yield from read_python_arguments(p, writer, p.tools.get(p.known_name(name)))
    p.end_call()


def read_python_arguments(p: ToolParser, w: JsonWriter, tool: ToolSpec | None) -> Steps[None]:
    """Arguments up to the closing parenthesis, as one object. Positions are named by the tool's schema."""
    w.begin_object()
    position = 0
    yield from p.skip_space()
    while (yield from p.accept(")")) is None:
        key = yield from _keyword(p)
        if key is None:
            names = tool.parameter_names if tool is not None else ()
            if position >= len(names):
                raise Broken("an argument without a name")
            key = names[position]
        position += 1
        w.key(key)
        yield from read_value(p, w, PYTHON)
        yield from p.skip_space()
        if (yield from p.expect(",", ")")) == ")":
            break
        yield from p.skip_space()
    w.end()


def _keyword(p: ToolParser) -> Steps[str | None]:
    """`NAME=`, consumed; None when the argument is given by position."""
    word = yield from p.take_while(_WORD)
    if word and (yield from p.peek()) == "=":
        p.skip(1)
        return word
    space = ""
    while word and (yield from p.peek()) == " ":
        p.skip(1)
        space += " "
    if space and (yield from p.peek()) == "=":
        p.skip(1)
        return word
    p.unread(word + space)
    return None
