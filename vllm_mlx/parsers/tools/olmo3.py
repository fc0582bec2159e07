"""OLMo 3: Python calls, one a line, in `<function_calls>`; read like `llama4`, but written so under a grammar."""

from __future__ import annotations

from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import Envelope
from vllm_mlx.parsers.tools.llama4 import Llama4


class Olmo3(Llama4):
    name = "olmo3"
    aliases = ()
    signs = (Sign("<function_calls></function_calls>"),)
    envelope = Envelope(
        open="<function_calls>",
        begin="",
        middle="(",
        end=")",
        separator="\n",
        close="</function_calls>",
        style="python",
        triggers=("<function_calls>",),
    )


FORMAT = Olmo3()
