"""Reads Gemma's calls, `call:NAME{key:value,...}`; what stands around them and around strings is the format's."""

from __future__ import annotations

from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.python_calls import read_python_arguments
from vllm_mlx.parsers.tool_parser import ToolParser
from vllm_mlx.parsers.values import Dialect, read_value


def read_gemma_calls(p: ToolParser, dialect: Dialect) -> Steps[None]:
    """One call, or several behind each other; models at times write parentheses for the braces."""
    yield from p.skip_space()
    yield from p.expect("call:")
    while True:
        name, bracket = yield from p.collect_until("{", "(", limit=256)
        writer = p.begin_call(name)
        if bracket == "{":
            p.unread(bracket)
            yield from read_value(p, writer, dialect)
        else:
            yield from read_python_arguments(p, writer, p.tools.get(p.known_name(name)))
        p.end_call()
        yield from p.skip_space()
        yield from p.accept(",")
        yield from p.skip_space()
        if (yield from p.accept("call:")) is None:
            return
