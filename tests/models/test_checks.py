"""What the diagnostics say of a model: a format without range, an end that cannot come, a template that fails."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vllm_mlx.models.checks import check_dtype, check_eos, check_template
from vllm_mlx.models.profile import ModelProfile

PROFILE = ModelProfile("m", Path("/m"), "qwen3", vocab_size=10, eos_token_ids=(3, 7), chat_template="{{ messages }}")


class Tokenizer:
    def __init__(self, answer: Any = "<user>hello") -> None:
        self.answer = answer

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def decode(self, ids: Any, **options: Any) -> str:
        return f"<{ids[0]}>"


@pytest.mark.parametrize(("stored", "loaded", "model_type", "status"), [
    ("bfloat16", "bfloat16", "qwen3", "pass"), ("bfloat16", "float32", "gemma3", "pass"),
    ("float16", "float16", "qwen3", "pass"), ("bfloat16", "float16", "qwen3", "warning"),
    ("float16", "float16", "gemma3_text", "warning")])  # fmt: skip
def test_float16_is_a_warning_where_its_range_may_not_do(stored, loaded, model_type, status):
    profile = replace(PROFILE, model_type=model_type)
    finding = check_dtype(replace(profile, dtype=stored), replace(profile, dtype=loaded))
    assert finding.status == status and loaded in finding.detail


def test_the_end_tokens_are_named_and_missed():
    found = check_eos(PROFILE, Tokenizer())
    assert found.status == "pass" and found.detail == "answers end at <3>, <7>"
    assert check_eos(replace(PROFILE, eos_token_ids=()), Tokenizer()).status == "fail"
    beyond = check_eos(replace(PROFILE, eos_token_ids=(3, 12)), Tokenizer())
    assert beyond.status == "warning" and "[12]" in beyond.detail


def test_a_template_is_tried():
    assert check_template(PROFILE, Tokenizer()).status == "pass"
    assert check_template(replace(PROFILE, chat_template=None), Tokenizer()).status == "warning"
    failing = check_template(PROFILE, Tokenizer(ValueError("no such role")))
    assert failing.status == "warning" and "no such role" in failing.detail
    assert "loses" in check_template(PROFILE, Tokenizer("<user>")).detail
