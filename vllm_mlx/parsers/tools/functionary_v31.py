"""Functionary v3.1: `<function=get_weather>{"city": "Paris"}</function>`; read like the other versions."""

from __future__ import annotations

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope
from vllm_mlx.parsers.tools.functionary import Functionary


class FunctionaryV31(Functionary):
    name = "functionary_v31"
    aliases = ("functionary_v3_1",)
    signs = (Sign("<function=example_function_name>{"), Sign("<function=", "</function>", "<|eom_id|>"))
    envelope = Envelope(begin="<function=", middle=">", end="</function>", triggers=("<function=",))


FORMAT = FunctionaryV31()
