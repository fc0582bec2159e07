"""Models named on the command line and in a file: what is read, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_mlx.errors import SettingsError
from vllm_mlx.fleet.specs import ModelSpec, read_specs
from vllm_mlx.options import settings_from


def read(tmp_path: Path, text: str, **arguments: object) -> tuple[ModelSpec, ...]:
    file = tmp_path / "models.yaml"
    file.write_text(text)
    return read_specs(settings_from({"pool.models_config": str(file), **arguments}, {}))


def test_models_follow_one_another_on_the_command_line() -> None:
    specs = read_specs(settings_from({"model.model": "a/b", "model.more_models": ["c/d", "/e"]}, {}))
    assert [spec.id for spec in specs] == ["a/b", "c/d", "/e"] == [spec.path for spec in specs]
    assert not any(spec.settings.model.more_models for spec in specs)


def test_a_file_gives_names_and_settings_of_their_own(tmp_path: Path) -> None:
    text = """
        models:
          - {id: big, path: org/big, aliases: [sonnet, opus], pinned: true}
          - path: demo
            settings: {max-num-seqs: 4, --default-temperature: 0.2, mllm: false, media-root: [/pictures]}
    """
    big, small = read(tmp_path, text, **{"batch.max_num_seqs": "9"})
    assert (big.id, big.path, big.aliases, big.is_pinned) == ("big", "org/big", ("sonnet", "opus"), True)
    assert big.settings.batch.max_num_seqs == 9
    assert (small.id, small.is_pinned) == ("demo", False)
    assert small.settings.batch.max_num_seqs == 4 and small.settings.sampling.default_temperature == 0.2
    assert small.settings.model.mllm is False and small.settings.media.media_root == ("/pictures",)


def test_a_model_on_the_command_line_stands_before_those_of_the_file(tmp_path: Path) -> None:
    specs = read(tmp_path, "models: [{path: org/b}]", **{"model.model": "org/a"})
    assert [spec.id for spec in specs] == ["org/a", "org/b"]


def test_models_beside_the_chat_have_a_kind_and_the_settings_of_their_kind(tmp_path: Path) -> None:
    text = """
        models:
          - {id: vectors, path: org/v, kind: embedding, settings: {embedding-max-length: 64, dtype: float32}}
          - {path: org/chat}
          - {id: ears, path: org/ears, kind: transcription, aliases: [whisper-1]}
    """
    flags = {"beside.rerank_model": "org/r", "beside.max_tts_input_chars": 9}
    vectors, chat, ears, ranker = read(tmp_path, text, **flags)
    assert [(s.id, s.kind) for s in (vectors, chat, ears, ranker)] == [
        ("vectors", "embedding"), ("org/chat", "chat"), ("ears", "transcription"), ("org/r", "rerank"),
    ]  # fmt: skip
    assert vectors.settings.beside.embedding_max_length == 64 and vectors.settings.model.dtype == "float32"
    assert not any(spec.settings.beside.rerank_model for spec in (vectors, chat, ears, ranker))
    assert chat.settings.beside.max_tts_input_chars == 9, "what is said of all of them stays"


@pytest.mark.parametrize(
    "text, words",
    [
        ("models: [{path: a, kind: embeding}]", "not 'embeding'; did you mean 'embedding'?"),
        ("models: [{path: a, kind: rerank}]", "has no chat model"),
        ("models: [{path: a, kind: speech, settings: {max-num-seqs: 3}}]", "no setting of a speech model"),
        ("models: [{path: a, kind: rerank, settings: {embedding-max-length: 9}}]", "no setting of a rerank model"),
        ("models: [{path: a, settings: {embedding-max-length: 9}}]", "no setting of a model"),
        ("models: [{path: a, alias: [b]}]", "model 1: there is no key 'alias'; did you mean 'aliases'?"),
        ("models: [{path: a, settings: {max-num-seq: 3}}]", "no setting of a model; did you mean 'max-num-seqs'?"),
        ("models: [{path: a, settings: {port: 3}}]", "'port' is no setting of a model"),
        ("models: [{path: a, settings: {max-num-seqs: many}}]", "takes a whole number, not 'many'"),
        ("models: [{id: a}]", "`path` must be"),
        ("models: [{path: a, pinned: 1}]", "`pinned` must be true or false"),
        ("models: [{path: a, aliases: b}]", "`aliases` must be a list"),
        ("models: [a]", "a model is a mapping"),
        ("models: [{path: a}, {path: b, aliases: [a]}]", "Two models are called 'a'"),
        ("models: []", "at least one model"),
        ("model: [{path: a}]", "must hold a list named `models`"),
        ("models: [{path: a}]\nextra: 1", "there is no key 'extra'"),
        ("models: [", "is not valid YAML"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(SettingsError) as error:
        read(tmp_path, text)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be read"):
        read_specs(settings_from({"pool.models_config": str(tmp_path / "none.yaml")}, {}))
