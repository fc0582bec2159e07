"""LongCat: GLM's pairs of key and value in tags of its own; a JSON body is read too."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tagged_calls import PairStyle, read_pairs
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_END = "</longcat_tool_call>"
_STYLE = PairStyle(
    "<longcat_arg_key>", "</longcat_arg_key>", "<longcat_arg_value>", "</longcat_arg_value>", outer_end=_END
)


class LongCat(ToolFormat):
    name = "longcat"
    openers = ("<longcat_tool_call>",)
    markers = (_END, _STYLE.key, _STYLE.key_end, _STYLE.value, _STYLE.value_end)
    needs_special_tokens = True
    signs = (Sign("<longcat_tool_call>"),)
    envelope = Envelope(
        begin="<longcat_tool_call>",
        middle="\n",
        end=_END,
        separator="\n",
        style="tags",
        parameter_begin=_STYLE.key,
        parameter_middle=f"{_STYLE.key_end}\n{_STYLE.value}",
        parameter_end=f"{_STYLE.value_end}\n",
        triggers=("<longcat_tool_call>",),
        special_tokens=("<longcat_tool_call>", _END),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from p.skip_space()
        if (yield from p.peek()) == "{":
            yield from read_json_calls(p)
        else:
            yield from read_pairs(p, _STYLE)
        yield from p.read_close(_END)


FORMAT = LongCat()
