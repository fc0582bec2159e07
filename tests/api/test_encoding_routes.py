"""/v1/embeddings, /v1/rerank and /v1/score: shapes, orders, bounds, and errors that name the field."""

from __future__ import annotations

import asyncio
import base64
import math

import numpy as np
import pytest

from tests.api.fake_beside import beside, make_oneshots
from tests.api.fakes import MODEL_ID, client_for, make_context, until
from vllm_mlx.settings import Settings


async def post(path: str, body: dict, **context) -> tuple[int, dict]:
    context = context or beside()
    async with client_for(make_context(**context)) as client:
        response = await client.post(path, json=body)
    return response.status_code, response.json()


async def test_an_embedding_answer_has_a_unit_vector_for_each_input_in_its_order():
    texts = ["a long text of letters", "b", "another"]
    status, body = await post("/v1/embeddings", {"model": "any", "input": texts})
    assert status == 200 and body["object"] == "list" and body["model"] == "test/embedder"
    assert [item["index"] for item in body["data"]] == [0, 1, 2]
    for text, item in zip(texts, body["data"], strict=True):
        alone = (await post("/v1/embeddings", {"input": text}))[1]["data"][0]["embedding"]
        assert item["embedding"] == alone and math.isclose(np.linalg.norm(alone), 1, abs_tol=1e-6)
    num_tokens = sum(len(t) + 2 for t in texts)
    assert body["usage"] == {"prompt_tokens": num_tokens, "total_tokens": num_tokens}


async def test_base64_holds_the_same_little_endian_floats():
    numbers = (await post("/v1/embeddings", {"input": "abc"}))[1]["data"][0]["embedding"]
    text = (await post("/v1/embeddings", {"input": "abc", "encoding_format": "base64"}))[1]["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(text), "<f4").tolist() == np.array(numbers, np.float32).tolist()


async def test_token_ids_are_embedded_as_they_are():
    by_text = (await post("/v1/embeddings", {"input": "ab"}))[1]
    by_ids = (await post("/v1/embeddings", {"input": [1, 97, 98, 2]}))[1]
    lists = (await post("/v1/embeddings", {"input": [[1, 97, 98, 2], [5]]}))[1]
    assert by_text["data"] == by_ids["data"] and lists["data"][0] == by_ids["data"][0]
    assert lists["usage"]["prompt_tokens"] == 5


async def test_fewer_dimensions_are_the_first_ones_made_a_unit_vector_again():
    whole = (await post("/v1/embeddings", {"input": "hello"}))[1]["data"][0]["embedding"]
    cut = (await post("/v1/embeddings", {"input": "hello", "dimensions": 2}))[1]["data"][0]["embedding"]
    assert np.allclose(cut, np.array(whole[:2]) / np.linalg.norm(whole[:2]), atol=1e-6)


async def test_long_inputs_are_cut_or_refused_as_the_operator_or_the_request_says():
    long = {"input": ["ok", "x" * 100]}
    assert (await post("/v1/embeddings", long))[1]["usage"]["prompt_tokens"] == 4 + 32
    refusing = beside(refuses_overflow=True)
    status, body = await post("/v1/embeddings", long, **refusing)
    assert status == 400 and body["error"]["param"] == "input.1"
    assert body["error"]["code"] == "context_length_exceeded" and "102 tokens" in body["error"]["message"]
    for cut, expected in ((-1, 32), (10, 10)):
        status, body = await post("/v1/embeddings", {**long, "truncate_prompt_tokens": cut}, **refusing)
        assert status == 200 and body["usage"]["prompt_tokens"] == 4 + expected
    assert (await post("/v1/embeddings", long, **beside(max_length=12)))[1]["usage"]["prompt_tokens"] == 4 + 12


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input.0"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[]]}, "input.0"),
        ({"input": [["a"]]}, "input.0.0"),
        ({"input": [300]}, "input.0"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 5}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "model": "test/ranker"}, "model"),
        ({"input": "a", "model": MODEL_ID}, "model"),
    ],
)
async def test_a_wrong_field_of_an_embedding_request_is_named(body, param):
    status, answer = await post("/v1/embeddings", body)
    assert status == 400, answer
    assert answer["error"]["param"] == param and answer["error"]["type"] == "invalid_request_error"


async def test_a_chat_only_server_names_the_flag():
    for path, body, flag in (
        ("/v1/embeddings", {"input": "a"}, "--embedding-model"),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}, "--rerank-model"),
        ("/v1/score", {"text_1": "a", "text_2": "b"}, "--rerank-model"),
    ):
        status, answer = await post(path, body, oneshots=make_oneshots())
        assert status == 404 and flag in answer["error"]["message"] and answer["error"]["code"] == "model_not_found"


async def test_the_chat_does_not_answer_for_an_embedding_model():
    body = {"model": "test/embedder", "messages": [{"role": "user", "content": "Hi"}]}
    status, answer = await post("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == "model" and "embedding" in answer["error"]["message"]


async def test_a_strict_server_wants_the_exact_name():
    strict = {**beside(), "settings": Settings().with_values(server__strict_model_id=True)}
    assert (await post("/v1/embeddings", {"input": "a", "model": "test/embedder"}, **strict))[0] == 200
    for name in ("other", None):
        status, answer = await post("/v1/embeddings", {"input": "a", "model": name}, **strict)
        assert status == 404 and "test/embedder" in answer["error"]["message"]


async def test_models_and_capabilities_tell_of_the_models_beside():
    async with client_for(make_context(**beside())) as client:
        listed = (await client.get("/v1/models")).json()["data"]
        assert [(m["id"], m.get("task")) for m in listed][-2:] == [
            ("test/embedder", "embedding"), ("test/ranker", "rerank")
        ]  # fmt: skip
        assert (await client.get("/v1/models/test/embedder")).json()["task"] == "embedding"
        told = (await client.get("/v1/capabilities")).json()
        assert told["features"]["embeddings"] and told["features"]["rerank"]
        await client.post("/v1/embeddings", json={"input": "x" * 100})
        metrics = (await client.get("/metrics")).text
    assert 'vllm_mlx:beside_tokens_total{task="embedding"} 32.0' in metrics
    assert "vllm_mlx:embedding_truncated_total 1.0" in metrics


DOCUMENTS = ["xyz", "abcd", {"text": "ab"}, "abc"]


async def test_documents_come_back_by_relevance():
    body = {"model": "any", "query": "abcd", "documents": DOCUMENTS}
    status, answer = await post("/v1/rerank", body)
    assert status == 200
    assert [result["index"] for result in answer["results"]] == [1, 3, 2, 0]
    assert [result["document"]["text"] for result in answer["results"]] == ["abcd", "abc", "ab", "xyz"]
    scores = [result["relevance_score"] for result in answer["results"]]
    assert np.allclose(scores, [1 / (1 + math.exp(2 - n)) for n in (4, 3, 2, 0)])
    assert answer["model"] == "test/ranker" and answer["usage"]["total_tokens"] > 0
    assert answer["meta"]["billed_units"] == {"search_units": 1}


async def test_top_n_and_documents_are_as_asked():
    body = {"query": "abcd", "documents": DOCUMENTS, "top_n": 2, "return_documents": False}
    answer = (await post("/v1/rerank", body))[1]
    assert [set(result) for result in answer["results"]] == [{"index", "relevance_score"}] * 2
    assert len((await post("/rerank", {**body, "top_n": 99}))[1]["results"]) == 4
    cohere = (await post("/v2/rerank", {"query": "abcd", "documents": DOCUMENTS}))[1]
    assert "document" not in cohere["results"][0]
    cut = (await post("/v1/rerank", {"query": "abcd", "documents": DOCUMENTS, "max_tokens_per_doc": 1}))[1]
    assert cut["results"][0]["relevance_score"] == pytest.approx(1 / (1 + math.e))
    # What comes back is the document, not what was read of it.
    assert cut["results"][0]["document"]["text"] == "abcd"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"documents": ["a"]}, "query"),
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "a"}, "documents"),
        ({"query": "a", "documents": []}, "documents"),
        ({"query": "a", "documents": [3]}, "documents.0"),
        ({"query": "a", "documents": [{"title": "b"}]}, "documents.0.text"),
        ({"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ({"query": "a", "documents": ["b"], "instruction": "Judge"}, "instruction"),
        ({"query": "a", "documents": ["b"], "model": "test/embedder"}, "model"),
    ],
)
async def test_a_wrong_field_of_a_rerank_request_is_named_in_both_shapes(body, param):
    status, answer = await post("/v1/rerank", body)
    assert status == 400, answer
    assert answer["error"]["param"] == param and answer["message"] == answer["error"]["message"]


async def test_scores_are_of_pairs():
    answer = (await post("/v1/score", {"text_1": "abcd", "text_2": ["abc", "x"]}))[1]
    assert [item["object"] for item in answer["data"]] == ["score"] * 2
    assert np.allclose([i["score"] for i in answer["data"]], [1 / (1 + math.exp(-1)), 1 / (1 + math.exp(2))])
    pairs = (await post("/score", {"text_1": ["abcd", "x"], "text_2": ["abc", "x"]}))[1]
    assert pairs["data"][0] == answer["data"][0] and len(pairs["data"]) == 2
    for body in ({"text_1": ["a", "b"], "text_2": "c"}, {"text_1": [], "text_2": []}):
        status, wrong = await post("/v1/score", body)
        assert status == 400 and wrong["error"]["param"] == "text_2"
    assert (await post("/v1/score", {"text_1": "a", "text_2": ""}))[1]["error"]["param"] == "text_2"


async def test_without_a_reranker_a_score_is_the_cosine():
    answer = (await post("/v1/score", {"text_1": "ab", "text_2": ["ab", "d"]}, **beside(rerank=False)))[1]
    assert answer["model"] == "test/embedder"
    assert answer["data"][0]["score"] == pytest.approx(1) and answer["data"][1]["score"] < 0.99
    named = {"model": "test/embedder", "text_1": "ab", "text_2": "ab"}
    assert (await post("/v1/score", named))[1]["model"] == "test/embedder"


async def test_more_requests_than_may_wait_are_refused_at_once():
    async with client_for(make_context(**beside(make_oneshots(max_queue=-1)))) as client:
        response = await client.post("/v1/embeddings", json={"input": "a"})
    assert response.status_code == 429 and "retry-after" in response.headers


async def test_a_request_can_be_cancelled_by_its_id():
    hold = HeldEngine()
    context = make_context(**beside(make_oneshots(hold)))
    async with client_for(context) as client:
        asking = asyncio.create_task(
            client.post("/v1/embeddings", json={"input": "a"}, headers={"x-request-id": "mine"})
        )
        await until(lambda: bool(hold.num_waiting))
        assert (await client.post("/v1/requests/mine/cancel")).json()["cancelled"]
        answer = await asking
    assert answer.status_code == 499 and answer.json()["error"]["code"] == "cancelled"
    assert not len(context.live)


class HeldEngine:
    """An engine whose thread is busy for ever."""

    num_waiting = 0

    async def call(self, job):
        self.num_waiting += 1
        await asyncio.Event().wait()
