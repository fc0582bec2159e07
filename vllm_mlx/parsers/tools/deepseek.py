"""DeepSeek V3 (0324) and R1 (0528): read like V3.1; a grammar writes their longer form with a fenced block."""

from __future__ import annotations

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope
from vllm_mlx.parsers.tools.deepseek_v31 import CALL, CALL_END, CALLS, CALLS_END, SEP, DeepSeekV31


class DeepSeek(DeepSeekV31):
    name = "deepseek"
    aliases = ("deepseek_v3", "deepseek_r1")
    signs = (Sign(f"{CALL}' + tool['type'] + '{SEP}"), Sign(CALL, "```json"))
    envelope = Envelope(
        open=CALLS,
        begin=f"{CALL}function{SEP}",
        middle="\n```json\n",
        end=f"\n```{CALL_END}",
        separator="\n",
        close=CALLS_END,
        triggers=(CALLS,),
        special_tokens=(CALLS, CALL, SEP, CALL_END, CALLS_END),
    )


FORMAT = DeepSeek()
