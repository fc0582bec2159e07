"""Llama 3.1 to 3.3: bare JSON as the whole answer; also behind `<|python_tag|>`, and `<function=f>{...}</function>`.

    {"name": "get_weather", "parameters": {"city": "Paris"}}

Bare JSON is a call only when it names a tool of the request. Built-in tools come as `brave_search.call(query="...")`.
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls, read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.python_calls import read_python_calls
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import QWEN, read_function_blocks
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class Llama(ToolFormat):
    name = "llama"
    aliases = ("llama3", "llama3_json", "llama3_1", "llama3_2", "llama3_3", "llama4_json")
    openers = ("<|python_tag|>", "<|python_start|>", "<function=", "\n{")
    markers = ("<|python_end|>",)
    needs_special_tokens = True
    signs = (Sign("<|python_tag|>"), Sign('"parameters": dictionary of argument name and its value'))
    envelope = Envelope(begin='{"name": "', middle='", "parameters": ', end="}", separator="; ")

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from read_bare_json_calls(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "\n{":
            p.unread("{")
            yield from read_bare_json_calls(p)
        elif opener == "<function=":
            p.unread(opener)
            yield from read_function_blocks(p, QWEN)
        else:
            yield from p.skip_space()
            if (yield from p.peek()) not in ("{", "["):
                yield from read_python_calls(p)
                return
            yield from read_json_calls(p)
            yield from p.skip_space()
            while (yield from p.accept(";")) is not None or (yield from p.peek()) == "{":
                yield from read_json_calls(p)
                yield from p.skip_space()
            if opener == "<|python_start|>":
                yield from p.read_close("<|python_end|>")


FORMAT = Llama()
