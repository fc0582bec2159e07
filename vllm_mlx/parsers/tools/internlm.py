"""InternLM 2, 2.5 and 3: `<|action_start|><|plugin|>{"name": "f", "parameters": {...}}<|action_end|>`."""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser


class InternLm(ToolFormat):
    name = "internlm"
    aliases = ("internlm2", "internlm3", "intern_s1")
    openers = ("<|action_start|>",)
    markers = ("<|plugin|>", "<|action_end|>")
    needs_special_tokens = True
    signs = (Sign("<|action_start|>"), Sign("<|plugin|>"), Sign(tokens=("<|action_start|>", "<|plugin|>")))
    envelope = Envelope(
        begin='<|action_start|><|plugin|>\n{"name": "',
        middle='", "parameters": ',
        end="}<|action_end|>",
        separator="\n",
        triggers=("<|action_start|>",),
        special_tokens=("<|action_start|>", "<|plugin|>", "<|action_end|>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from p.skip_space()
        yield from p.accept("<|plugin|>")
        yield from read_json_calls(p)
        yield from p.read_close("<|action_end|>")


FORMAT = InternLm()
