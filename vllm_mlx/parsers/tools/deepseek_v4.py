"""DeepSeek V4: V3.2's DSML with `tool_calls` for the outer tag. Both are read; a grammar writes this one."""

from __future__ import annotations

from dataclasses import replace

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tools import deepseek_v32


class DeepSeekV4(deepseek_v32.DeepSeekV32):
    name = "deepseek_v4"
    aliases = ()
    signs = (Sign("｜DSML｜tool_calls"), Sign("｜DSML｜", "}}tool_calls>"))
    envelope = replace(
        deepseek_v32.FORMAT.envelope,
        open="<｜DSML｜tool_calls>\n",
        close="</｜DSML｜tool_calls>",
        triggers=("<｜DSML｜tool_calls>",),
    )


FORMAT = DeepSeekV4()
