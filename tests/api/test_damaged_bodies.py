"""Damaged requests to the routes beside the chat: each is answered, none by a 500, and every error says something."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from tests.api.fake_beside import audio, beside, make_oneshots
from tests.api.fakes import client_for, make_context
from tests.generation.test_tool_loop import FakeTools
from tools.fuzz import damaged
from vllm_mlx.generation.oneshot import BesideModels

BODIES = {
    "/v1/embeddings": [
        {"model": "x", "input": ["hello", "there"], "encoding_format": "base64", "dimensions": 2, "user": "u"},
        {"input": [1, 97, 2], "truncate_prompt_tokens": -1},
        {"input": [[1, 97], [98]], "encoding_format": "float"},
    ],
    "/v1/rerank": [
        {"model": "x", "query": "q", "documents": ["a", {"text": "b"}], "top_n": 1, "return_documents": True},
        {"query": "q", "documents": ["a"], "max_tokens_per_doc": 3},
    ],
    "/v1/score": [{"model": "x", "text_1": "a", "text_2": ["b", "c"]}, {"text_1": ["a"], "text_2": ["b"]}],
    "/v1/audio/speech": [
        {"model": "x", "input": "Hello. There.", "voice": "anna", "response_format": "wav", "speed": 1.5},
        {"input": "Hi", "voice": {"id": "bruno"}, "stream_format": "sse", "response_format": "pcm"},
    ],
    "/v1/mcp/execute": [{"tool_name": "s__look", "arguments": {"at": "it"}}],
}


@pytest.mark.parametrize("route", list(BODIES))
async def test_no_damaged_body_is_a_500(route):
    oneshots = make_oneshots()
    models = [*beside(oneshots)["beside"], *audio(oneshots=oneshots)["beside"]]
    context = make_context(beside=BesideModels(models), oneshots=oneshots, mcp=FakeTools())
    seen: Counter[int] = Counter()
    async with client_for(context) as client:
        for number in range(150):
            rng = random.Random(f"{route}.{number}")
            body = damaged(rng, rng.choice(BODIES[route]))
            answer = await client.post(route, content=body, headers={"content-type": "application/json"})
            seen[answer.status_code] += 1
            assert answer.status_code in (200, 400, 404), (answer.status_code, body[:300])
            if answer.status_code != 200:
                assert answer.json()["error"]["message"], body[:300]
    assert seen[200] and seen[400], seen
    assert not len(context.live)
