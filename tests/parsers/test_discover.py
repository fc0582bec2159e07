"""Formats are found by every name in use, and chosen from what templates and vocabularies contain."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from vllm_mlx.parsers import discover, reasoning, tools

# The names of `--tool-call-parser` and `--reasoning-parser` in the operator guide, in both reference servers, in vLLM.
TOOL_NAMES = """
    auto mistral qwen qwen3 qwen3_coder qwen3_xml qwen3.5 llama llama3 llama4 hermes nous
    deepseek deepseek_v3 deepseek_r1
    kimi kimi_k2 moonshot liquidai liquid lfm granite granite3 nemotron nemotron3 xlam functionary meetkai
    glm47 glm4 harmony gpt-oss gemma4 minimax minimax_m2 step3p5 step poolside_v1
    llama3_json llama4_json llama4_pythonic pythonic deepseek_v31 deepseek_v32 deepseek_v4 glm45 granite-20b-fc
    glm4.5 glm4.7 GLM-4.6 deepseek-v3.1 deepseek_v3.2 function_gemma gemma3 command-r phi-4 phi4
    internlm kimi_k3 longcat olmo3 openai phi4_mini_json seed_oss functiongemma command_r minicpm5 muse_spark
"""
REASONING_NAMES = """
    auto qwen3 deepseek_r1 gpt_oss gpt-oss harmony gemma4 glm4 mistral poolside_v1 step3p5
    glm glm4.5 granite magistral seed_oss kimi minimax nemotron glm45 deepseek_v3 minimax_m2 olmo3 openai_gptoss
"""


@pytest.mark.parametrize("name", TOOL_NAMES.split())
def test_tool_format_is_found(name: str) -> None:
    assert discover.find_tool_format(name).name


@pytest.mark.parametrize("name", REASONING_NAMES.split())
def test_reasoning_format_is_found(name: str) -> None:
    assert discover.find_reasoning_format(name).name


def test_unknown_name_says_which_there_are() -> None:
    with pytest.raises(KeyError, match="hermes"):
        discover.find_tool_format("nonsense")


def test_every_file_is_a_format_of_its_own_name_or_alias() -> None:
    for package, find in (("tools", discover.find_tool_format), ("reasoning", discover.find_reasoning_format)):
        folder = Path(discover.__file__).parent / package
        for path in folder.glob("[!_]*.py"):
            format = find(path.stem)
            assert path.stem in (format.name, *format.aliases)


@pytest.mark.parametrize("package", [tools, reasoning])
def test_no_name_belongs_to_two_formats(package: ModuleType) -> None:
    owners: dict[str, str] = {}
    for module in pkgutil.iter_modules(package.__path__):
        format = importlib.import_module(f"{package.__name__}.{module.name}").FORMAT
        for name in {module.name, format.name, *format.aliases}:
            assert name not in owners, f"{name} is claimed by {owners[name]} and {module.name}"
            owners[name] = module.name


TEMPLATES = yaml.safe_load((Path(__file__).parent / "templates.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", TEMPLATES, ids=lambda case: case["model"])
def test_formats_are_chosen_from_the_template(case: dict[str, str]) -> None:
    assert discover.choose_tool_format(case["excerpt"]) == case.get("tools")
    assert discover.choose_reasoning_format(case["excerpt"]) == case.get("reasoning")


def test_escaped_line_breaks_in_a_template_make_no_difference() -> None:
    assert discover.choose_tool_format("{{- '<tool_call>\\n<function=' }}") == "qwen_xml"


@pytest.mark.parametrize(
    ("tokens", "tool_format", "reasoning_format"),
    [
        (("<|tool_call_start|>", "<|tool_call_end|>"), "liquid", None),
        (("<|channel|>", "<|message|>", "<|call|>"), "harmony", "harmony"),
        (("[TOOL_CALLS]", "[ARGS]", "[THINK]", "[/THINK]"), "mistral", "mistral"),
        (("<|open|>", "<|sep|>", "<|close|>"), "kimi_k3", "kimi_k3"),
        (("<think>", "</think>", "<|im_end|>"), None, "think_tags"),
        ((), None, None),
    ],
)
def test_without_a_template_the_special_tokens_tell(
    tokens: tuple[str, ...], tool_format: str | None, reasoning_format: str | None
) -> None:
    assert discover.choose_tool_format(None, tokens) == tool_format
    assert discover.choose_reasoning_format(None, tokens) == reasoning_format
