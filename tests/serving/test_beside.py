"""A live server with models beside the chat: real folders, real MLX thread, chat streams that go on meanwhile."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

from tests import tiny_encoders
from tests.generation.test_audio_files import wav
from tests.serving.process import ServerProcess, serving
from tests.tiny_whisper import build_whisper

GREEDY = {"temperature": 0, "max_tokens": 200, "ignore_eos": True}
HI = [{"role": "user", "content": "Hi there"}]


@pytest.fixture(scope="module")
def server(tiny_model, tmp_path_factory) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("beside")
    embedder = tiny_encoders.build_embedder("bert", folder / "embedder")
    ranker = tiny_encoders.build_cross_encoder("bert", folder / "ranker")
    whisper = build_whisper(folder / "whisper")
    flags = ["--embedding-model", str(embedder), "--rerank-model", str(ranker), "--stt-model", str(whisper)]
    flags += ["--repetition-policy", "off", "--embedding-max-length", "32", "--max-audio-upload-mb", "1"]
    with serving(tiny_model("qwen3"), *flags, log=folder / "log") as running:
        yield running
        running.signal()
        assert running.wait() == 0
        assert "Traceback" not in running.output, running.output


def test_the_sdk_gets_the_vectors_of_the_model(server):
    from vllm_mlx.models.encoder import load_embedder
    from vllm_mlx.models.token_row import TokenRow

    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    texts = ["the quick brown fox", "liquor jugs", "a lazy dog and a box " * 40]
    # Its default is base64, which it decodes; numbers must be the same.
    answer = client.embeddings.create(model="text-embedding-3-small", input=texts)
    numbers = client.embeddings.create(model="x", input=texts, encoding_format="float")
    model = load_embedder(answer.model)
    rows = [TokenRow(tuple(model.tokenizer.encode(t, truncation=True, max_length=32))) for t in texts]
    expected = model.compute(rows)
    for answered in (answer, numbers):
        assert np.abs(np.array([d.embedding for d in answered.data]) - expected).max() < 1e-5
    assert answer.usage.prompt_tokens == sum(map(len, rows))
    assert len(client.embeddings.create(model="x", input="a", dimensions=8).data[0].embedding) == 8
    with pytest.raises(openai.BadRequestError) as caught:
        client.embeddings.create(model="x", input="")
    assert caught.value.param == "input.0"


def test_a_clip_larger_than_the_flag_allows_is_413(server):
    files = {"file": ("clip.wav", wav(10.0, rate=44_100, channels=2))}
    refused = httpx.post(f"{server.url}/v1/audio/transcriptions", files=files, timeout=60)
    assert refused.status_code == 413 and "1 MiB" in refused.json()["error"]["message"], refused.text


def test_documents_are_ranked_by_the_model(server):
    documents = ["a lazy dog", "the quick brown fox jumps", "get_weather"]
    body = {"query": "fox", "documents": documents}
    results = httpx.post(f"{server.url}/v1/rerank", json=body, timeout=60).json()["results"]
    scores = httpx.post(f"{server.url}/v1/score", json={"text_1": "fox", "text_2": documents}, timeout=60).json()
    by_index = {r["index"]: r["relevance_score"] for r in results}
    assert [by_index[i] for i in range(3)] == pytest.approx([d["score"] for d in scores["data"]], abs=1e-6)
    assert [r["relevance_score"] for r in results] == sorted(by_index.values(), reverse=True)


def test_a_stream_beside_many_embeddings_says_the_same_and_shares_the_thread(server):
    body = {"model": "default", "messages": HI, **GREEDY}
    alone = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    texts = [f"{i} the quick brown fox" for i in range(400)]
    answers: list[httpx.Response] = []

    def embed() -> None:
        answers.append(httpx.post(f"{server.url}/v1/embeddings", json={"input": texts}, timeout=120))

    pieces, others = [], [threading.Thread(target=embed) for _ in range(3)]
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json={**body, "stream": True}, timeout=60) as stream:
        for line in stream.iter_lines():
            if not pieces:
                for other in others:
                    other.start()
            if line.startswith("data: {"):
                pieces.append(json.loads(line[6:])["choices"][0]["delta"].get("content") or "")
    for other in others:
        other.join()
    assert "".join(pieces) == alone["choices"][0]["message"]["content"]
    assert [len(a.json()["data"]) for a in answers] == [400] * 3


def test_a_clip_is_heard_while_a_stream_goes_on(server):
    body = {"model": "default", "messages": HI, **GREEDY}
    alone = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    form = {"response_format": "verbose_json", "language": "en", "temperature": "0.5"}
    answers: list[httpx.Response] = []

    def hear() -> None:
        files = {"file": ("clip.wav", wav(3.0, rate=44_100, channels=2))}
        url = f"{server.url}/v1/audio/transcriptions"
        answers.append(httpx.post(url, files=files, data=form, timeout=120))

    hearing = threading.Thread(target=hear)
    hearing.start()
    beside = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
    hearing.join()
    assert beside["choices"] == alone["choices"]
    told = answers[0].json()
    assert told["duration"] == pytest.approx(3, abs=0.01) and told["language"] == "english"
    assert told["segments"] and told["text"] == "".join(s["text"] for s in told["segments"]).strip()


def test_status_and_announcement_name_them(server):
    assert "for embedding" in server.output and "for rerank" in server.output
    features = httpx.get(f"{server.url}/v1/capabilities").json()["features"]
    assert features["embeddings"] and features["rerank"] and features["transcription"]
