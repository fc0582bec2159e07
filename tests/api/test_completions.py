"""Claims about POST /v1/completions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.api.fakes import MODEL_ID, FakeGeneration, client_for, finished, logprobs, make_context, says, sse_payloads
from vllm_mlx.errors import EngineError
from vllm_mlx.parsers.events import TextDelta

PATH = "/v1/completions"


async def ask(service: FakeGeneration, **body):
    async with client_for(make_context(service)) as client:
        return await client.post(PATH, json={"model": MODEL_ID, **body})


def streamed_texts(response, num_choices: int) -> list[str]:
    texts = [""] * num_choices
    for chunk in sse_payloads(response.text):
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    return texts


async def test_a_text_prompt_is_continued_without_parsing():
    service = FakeGeneration()
    answer = (await ask(service, prompt="Once", max_tokens=5)).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": "Hello world", "logprobs": None, "finish_reason": "stop", "stop_reason": None}
    ]
    (request,) = service.requests
    assert request.prompt == "Once" and not request.parse_output and request.max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        ("", [""]),
    ],
)
async def test_every_form_of_prompt_is_understood(prompt, expected):
    service = FakeGeneration()
    assert (await ask(service, prompt=prompt)).status_code == 200
    assert sorted((r.prompt for r in service.requests), key=str) == sorted(expected, key=str)


@pytest.mark.parametrize("prompt", [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [-1], {"a": 1}, 5, None, [1.5]])
async def test_every_wrong_form_of_prompt_is_a_400_that_names_it(prompt):
    response = await ask(FakeGeneration(), prompt=prompt)
    assert response.status_code == 400 and response.json()["error"]["param"].startswith("prompt")


async def test_choices_are_numbered_by_prompt_then_choice_and_usage_counts_each_prompt_once():
    service = FakeGeneration(lambda r: says(f"{r.prompt}{r.sampling.seed}"))
    answer = (await ask(service, prompt=["a", "b"], n=2, seed=0)).json()
    assert [c["text"] for c in answer["choices"]] == ["a0", "a1", "b0", "b1"]
    assert answer["usage"]["prompt_tokens"] == 22 and answer["usage"]["completion_tokens"] == 28
    streamed = await ask(service, prompt=["a", "b"], n=2, seed=0, stream=True, stream_options={"include_usage": True})
    assert streamed_texts(streamed, 4) == ["a0", "a1", "b0", "b1"]
    assert sse_payloads(streamed.text)[-1]["usage"] == answer["usage"]


async def test_echo_puts_the_prompt_first_streamed_or_not():
    service = FakeGeneration()
    assert (await ask(service, prompt="Once ", echo=True)).json()["choices"][0]["text"] == "Once Hello world"
    assert streamed_texts(await ask(service, prompt="Once ", echo=True, stream=True), 1) == ["Once Hello world"]
    from_ids = await ask(service, prompt=[72, 105], echo=True)
    assert from_ids.json()["choices"][0]["text"] == "HiHello world"


async def test_logprobs_have_the_legacy_shape_streamed_or_not():
    service = FakeGeneration(lambda r: [logprobs("Hel", "lo"), *says("Hello")])
    found = (await ask(service, prompt="x", logprobs=2)).json()["choices"][0]["logprobs"]
    assert found == {
        "tokens": ["Hel", "lo"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"other": -1.5, "Hel": -0.5}, {"other": -1.5, "lo": -0.5}],
        "text_offset": [0, 3],
    }
    chunks = sse_payloads((await ask(service, prompt="x", logprobs=2, stream=True)).text)
    assert chunks[0]["choices"][0]["logprobs"] == found


async def test_an_echoed_prompt_is_scored_and_its_first_token_has_no_score():
    prompt_scores = replace(logprobs("b", "c"), is_prompt=True)
    service = FakeGeneration(lambda r: [prompt_scores, logprobs("d"), *says("d")])
    body = {"prompt": "\x01bc", "echo": True, "logprobs": 1}
    found = (await ask(service, **body)).json()["choices"][0]["logprobs"]
    assert service.requests[0].num_prompt_logprobs == 1
    assert found["tokens"] == ["\x01", "b", "c", "d"] and found["text_offset"] == [0, 1, 2, 3]
    assert found["token_logprobs"] == [None, -0.5, -0.5, -0.5] and found["top_logprobs"][0] is None
    chunks = sse_payloads((await ask(service, **body, stream=True)).text)
    assert chunks[0]["choices"][0]["logprobs"] == found
    assert chunks[0]["choices"][0]["text"] == "\x01bcd"


@pytest.mark.parametrize("stream", [False, True])
async def test_zero_tokens_with_echo_score_the_prompt_and_complete_nothing(stream):
    service = FakeGeneration(lambda r: [replace(logprobs("b"), is_prompt=True), logprobs("z"), *says("z")])
    body = {"prompt": "\x01b", "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        response = await ask(service, **body, stream=True, stream_options={"include_usage": True})
        first, last = sse_payloads(response.text)
        choice, usage = first["choices"][0], last["usage"]
    else:
        answer = (await ask(service, **body)).json()
        choice, usage = answer["choices"][0], answer["usage"]
    assert choice["text"] == "\x01b" and choice["logprobs"]["tokens"] == ["\x01", "b"]
    assert choice["finish_reason"] == "length" and usage["completion_tokens"] == 0
    assert service.requests[0].max_tokens == 1


async def test_prompt_logprobs_have_vllms_shape():
    service = FakeGeneration(lambda r: [replace(logprobs("b"), is_prompt=True), *says("z")])
    found = (await ask(service, prompt="ab", prompt_logprobs=2)).json()["choices"][0]["prompt_logprobs"]
    assert found[0] is None
    assert found[1]["0"] == {"logprob": -0.5, "rank": 1, "decoded_token": "b"}
    assert found[1]["1"]["decoded_token"] == "other"


@pytest.mark.parametrize(
    ("field", "value"),
    [("suffix", "end"), ("best_of", 3), ("max_tokens", 0), ("use_beam_search", True), ("bad_words", ["x"])],
)
async def test_what_is_not_served_is_refused_by_name(field, value):
    response = await ask(FakeGeneration(), prompt="x", **{field: value})
    assert response.status_code == 400 and response.json()["error"]["param"] == field


async def test_values_without_effect_are_accepted():
    assert (
        await ask(FakeGeneration(), prompt="x", suffix="", best_of=1, user="me", length_penalty=1.0)
    ).status_code == 200


async def test_a_stream_that_fails_ends_with_an_error_and_done():
    response = await ask(FakeGeneration(lambda r: [TextDelta("a"), EngineError("x")]), prompt="p", stream=True)
    assert sse_payloads(response.text)[-1]["error"]["type"] == "server_error"


async def test_a_length_finish_is_told():
    service = FakeGeneration(lambda r: says("a", end=finished("length")))
    assert (await ask(service, prompt="p")).json()["choices"][0]["finish_reason"] == "length"
