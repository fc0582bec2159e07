"""Cohere Command R7B and A: an array between action tokens; Command R and R+: a fenced array behind `Action:`.

    <|START_ACTION|>[
        {"tool_call_id": "0", "tool_name": "get_weather", "parameters": {"city": "Paris"}}
    ]<|END_ACTION|>

Ids are numbers that start anew in each turn, so they are not passed on.
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser

_FENCED = ("Action: ```json", "Action:```json", "Action:\n```json")


class CommandR(ToolFormat):
    name = "command_r"
    aliases = ("cohere", "command_a", "command_r7b", "cohere2", "cohere2_moe")
    openers = ("<|START_ACTION|>", *_FENCED)
    markers = ("<|END_ACTION|>",)
    needs_special_tokens = True
    signs = (Sign("<|START_ACTION|>"), Sign("Action:", "```json"), Sign(tokens=("<|START_ACTION|>",)))
    envelope = Envelope(
        open="<|START_ACTION|>[\n    ",
        begin='{"tool_name": "',
        middle='", "parameters": ',
        end="}",
        separator=",\n    ",
        close="\n]<|END_ACTION|>",
        triggers=("<|START_ACTION|>",),
        special_tokens=("<|START_ACTION|>", "<|END_ACTION|>"),
    )

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from read_json_calls(p, has_ids=False)
        if opener in _FENCED:
            yield from p.skip_space()
            yield from p.accept("```")
            p.settle()
        else:
            yield from p.read_close("<|END_ACTION|>")


FORMAT = CommandR()
