"""What stands between `<tool_call>` and `</tool_call>`: the same tags hold different bodies, and models trained on
several of them mix them up, so every format with these tags reads them all.

    {"name": "f", "arguments": {...}}                                   JSON (Hermes, Qwen, Granite 4); or an array
    <function=f><parameter=a>1</parameter></function>                   XML (Qwen3-Coder, Nemotron 3, Step 3.5)
    f <arg_key>a</arg_key><arg_value>1</arg_value>                      pairs (GLM 4.5, Laguna)
"""

from __future__ import annotations

from vllm_mlx.parsers.json_calls import read_json_calls
from vllm_mlx.parsers.machine import Steps
from vllm_mlx.parsers.tagged_calls import GLM, QWEN, read_function_blocks, read_pairs
from vllm_mlx.parsers.tool_parser import ToolParser

TAG_OPENERS = ("<tool_call>",)


def read_tool_call_tag(p: ToolParser) -> Steps[None]:
    """Everything behind the opening tag, closing tag included."""
    yield from p.skip_space()
    if (yield from p.peek()) in ("{", "["):
        yield from read_json_calls(p)
    elif (yield from p.looking_at("<function")) is not None:
        yield from read_function_blocks(p, QWEN)
    else:
        yield from read_pairs(p, GLM)
    yield from p.read_close("</tool_call>")
