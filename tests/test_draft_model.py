"""`--draft-model`: refused before anything is loaded where its tokens are other tokens."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import tiny_models
from vllm_mlx.beside import find_draft
from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import Settings


def settings(draft: Path, **more: str) -> Settings:
    values = {"speculation__draft_model": str(draft), **more}
    return Settings().with_values(**values)


def test_the_same_tokenizer_is_taken(tmp_path: Path) -> None:
    served, draft = tiny_models.build("qwen3", tmp_path / "a"), tiny_models.build("llama", tmp_path / "b")
    assert find_draft(settings(draft), served) == draft


def test_another_tokenizer_is_refused_with_the_first_token_that_differs(tmp_path: Path) -> None:
    served, draft = tiny_models.build("qwen3", tmp_path / "a"), tiny_models.build("llama", tmp_path / "b")
    file = draft / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(SettingsError, match="another tokenizer than the served model: 600 and 600 entries; 'a' is"):
        find_draft(settings(draft), served)


def test_a_draft_model_and_no_speculation_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--draft-model is of no use with --speculation off"):
        settings(tmp_path, speculation__speculation="off").resolve()
