"""The two promises about repetition: --deterministic gives the same bytes, --batch-invariant the same tokens."""

from __future__ import annotations

import base64
import io
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from PIL import Image

from tests.serving.process import ServerProcess, serving

WORDS = "pong sun river seven green what is the of and count to say red blue why how many legs has a spider".split()
Call = tuple[str, dict[str, Any]]

TOOL = {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}


def image(colour: str) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), colour).save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


def words(rng: random.Random, most: int) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(rng.randrange(1, most)))


def mixed_calls(rng: random.Random) -> list[Call]:
    """Twenty: text and images, whole and streamed, over four protocols, some with tools; and one of them twice."""
    calls: list[Call] = []
    for number in range(19):
        stream = number % 2 == 0
        text: Any = words(rng, 12)
        match number % 5:
            case 0:
                calls.append(("completions", {"prompt": text, "stream": stream, "logprobs": 2}))
            case 1:
                calls.append(("messages", {"messages": [{"role": "user", "content": text}], "stream": stream}))
            case 2:
                parts = [{"type": "text", "text": text}, image(rng.choice(["red", "blue", "green"]))]
                calls.append(("chat/completions", {"messages": [{"role": "user", "content": parts}], "stream": stream}))
            case 3:
                body = {"messages": [{"role": "user", "content": text}], "stream": stream, "tool_choice": "required",
                        "tools": [{"type": "function", "function": TOOL}]}  # fmt: skip
                calls.append(("chat/completions", body))
            case 4:
                body = {"messages": [{"role": "user", "content": text}], "stream": stream, "n": 2, "logprobs": True}
                calls.append(("chat/completions", body))
    calls[15] = ("responses", {"input": "Reply with pong", "stream": True, "store": False})
    limits = {"responses": {"max_output_tokens": 12}}
    calls = [
        (route, {"model": "default", "temperature": 1.3, **limits.get(route, {"max_tokens": 12}), **body})
        for route, body in calls
    ]
    return [*calls, calls[0]]


def send(server: ServerProcess, call: Call) -> bytes:
    response = httpx.post(f"{server.url}/v1/{call[0]}", json=call[1], timeout=120)
    assert response.status_code == 200, response.text
    return response.content


def test_deterministic_gives_the_same_bytes_to_twenty_at_once_and_after_a_restart(tmp_path) -> None:
    calls = mixed_calls(random.Random(7))
    order = random.Random(8)

    def run(server: ServerProcess) -> list[bytes]:
        shuffled = order.sample(range(len(calls)), len(calls))
        with ThreadPoolExecutor(len(calls)) as pool:
            sent = dict(zip(shuffled, pool.map(lambda i: send(server, calls[i]), shuffled), strict=True))
        answers = [sent[i] for i in range(len(calls))]
        # The twins may be answered in either order.
        return [*answers[1:-1], *sorted((answers[0], answers[-1]))]

    runs = []
    for name in ("first", "second"):
        with serving("demo", "--deterministic", log=tmp_path / name) as server:
            runs += [run(server), run(server)]
    assert runs[0] == runs[1] == runs[2] == runs[3]


@pytest.fixture(scope="module")
def invariant(tmp_path_factory) -> Iterator[ServerProcess]:
    flags = ["--batch-invariant", "--runtime-mode", "batched", "--repetition-policy", "off"]
    with serving("demo", *flags, log=tmp_path_factory.mktemp("invariant") / "log") as server:
        yield server


def test_batch_invariant_equals_the_lone_run_token_for_token(invariant) -> None:
    rng = random.Random(9)

    def call() -> Call:
        content: Any = words(rng, 30)
        if rng.random() < 0.2:
            content = [{"type": "text", "text": content}, image(rng.choice(["red", "blue"]))]
        return "chat/completions", {
            "model": "default", "messages": [{"role": "user", "content": content}], "temperature": 0,
            "max_tokens": rng.randrange(1, 7), "ignore_eos": True, "logprobs": True, "diagnostics_level": "deep",
        }  # fmt: skip

    def tokens(call: Call) -> tuple[list[str], int]:
        answer = httpx.post(f"{invariant.url}/v1/{call[0]}", json=call[1], timeout=120).json()
        entries = answer["choices"][0]["logprobs"]["content"]
        rows = answer["diagnostics"]["runtime"]["max_batch_rows"]
        return [entry["token"] for entry in entries], rows

    calls = [call() for _ in range(200)]
    alone = [tokens(c) for c in calls]
    together: list[tuple[list[str], int]] = []
    with ThreadPoolExecutor(24) as pool:
        while len(together) < len(calls):
            some = calls[len(together) : len(together) + rng.randrange(1, 25)]
            together += pool.map(tokens, some)
    assert max(rows for _, rows in alone) == 1 and max(rows for _, rows in together) > 8
    assert [t for t, _ in together] == [t for t, _ in alone]
