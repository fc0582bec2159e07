"""FunctionGemma (Gemma 3 270M): `<start_function_call>call:f{city:<escape>Paris<escape>}<end_function_call>`.

Larger Gemma 3 models have no format of their own; Google's guide has them write Python in a `tool_code` fence.
"""

from __future__ import annotations

from vllm_mlx.parsers.gemma_calls import read_gemma_calls
from vllm_mlx.parsers.json_calls import read_bare_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.python_calls import read_python_calls
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser
from vllm_mlx.parsers.values import Dialect

_QUOTE = "<escape>"
_DIALECT = Dialect(has_bare_strings=True, quotes=(_QUOTE,))


class FunctionGemma(ToolFormat):
    name = "function_gemma"
    aliases = ("functiongemma", "gemma3", "gemma")
    openers = ("<start_function_call>", "```tool_code")
    markers = ("<end_function_call>", _QUOTE)
    needs_special_tokens = True
    signs = (Sign("<start_function_call>"), Sign(tokens=("<start_function_call>",)))
    envelope = Envelope(
        begin="<start_function_call>call:",
        middle="{",
        end="}<end_function_call>",
        style="gemma",
        quote=_QUOTE,
        triggers=("<start_function_call>",),
        special_tokens=("<start_function_call>", "<end_function_call>", _QUOTE),
    )

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from read_bare_json_calls(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        if opener == "```tool_code":
            yield from read_python_calls(p)
            yield from p.skip_space()
            yield from p.accept("```")
            p.settle()
        else:
            yield from read_gemma_calls(p, _DIALECT)
            yield from p.read_close("<end_function_call>")


FORMAT = FunctionGemma()
