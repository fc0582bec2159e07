"""Any of the formats whose markers cannot be mistaken, for a model whose template does not tell which one it uses.

Not included: formats that read plain lines or whole answers (Functionary's recipients, Python lists), save bare JSON
that names a tool of the request. There is no envelope: nothing says how the model would write.
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_bare_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.tool_parser import ToolFormat, ToolParser
from vllm_mlx.parsers.tools import (
    command_r,
    deepseek_v31,
    deepseek_v32,
    function_gemma,
    gemma4,
    granite,
    hermes,
    internlm,
    kimi,
    liquid,
    llama,
    longcat,
    minicpm5,
    minimax,
    mistral,
    muse_spark,
    nemotron,
    phi4,
    qwen_xml,
    seed_oss,
)

# Of two that share an opener, the later one reads it.
_FORMATS: tuple[ToolFormat, ...] = (
    granite.FORMAT,
    phi4.FORMAT,
    llama.FORMAT,
    nemotron.FORMAT,
    qwen_xml.FORMAT,
    hermes.FORMAT,
    command_r.FORMAT,
    deepseek_v31.FORMAT,
    deepseek_v32.FORMAT,
    function_gemma.FORMAT,
    gemma4.FORMAT,
    internlm.FORMAT,
    kimi.FORMAT,
    liquid.FORMAT,
    longcat.FORMAT,
    minicpm5.FORMAT,
    minimax.FORMAT,
    mistral.FORMAT,
    muse_spark.FORMAT,
    seed_oss.FORMAT,
)
_BY_OPENER = {opener: format for format in _FORMATS for opener in format.openers}


class Auto(ToolFormat):
    name = "auto"
    aliases = ("generic",)
    openers = tuple(_BY_OPENER)
    markers = tuple(marker for format in _FORMATS for marker in format.markers)
    needs_special_tokens = True

    @property
    def ends_reasoning(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(opener for format in _FORMATS for opener in format.ends_reasoning))

    def read_start(self, p: ToolParser) -> Steps[None]:
        yield from read_bare_json_calls(p)

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        yield from _BY_OPENER[opener].read(p, opener)


FORMAT = Auto()
