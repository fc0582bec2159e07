"""`<think>...</think>`: Qwen3, DeepSeek-R1, GLM, MiniMax, Nemotron and most others.

Whether a template opens the tag in the prompt (DeepSeek-R1, QwQ, Qwen3-Thinking) is seen in the prompt, not here.
"""

from __future__ import annotations

from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.signs import Sign

FORMAT = ReasoningFormat(
    name="think_tags",
    aliases=(
        "think",
        "qwen3",
        "qwen3_5",
        "qwq",
        "deepseek_v31",
        "deepseek_v32",
        "deepseek_r1",
        "deepseek",
        "deepseek_v3",
        "glm",
        "glm4",
        "glm45",
        "glm47",
        "minimax",
        "minimax_m2",
        "minimax_m2_append_think",
        "nemotron",
        "nemotron_v3",
        "nemotron3",
        "ernie45",
        "hunyuan_a13b",
        "olmo3",
        "holo2",
        "poolside_v1",
        "step3",
        "step3p5",
        "smollm3",
    ),
    pairs=(("<think>", "</think>"),),
    dropped=("<|begin_of_box|>", "<|end_of_box|>"),
    signs=(Sign("<think>"), Sign("</think>"), Sign(tokens=("<think>", "</think>"))),
    forced_end="\n</think>\n\n",
)
