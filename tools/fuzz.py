"""Broken requests by the thousand: none may be answered 500, left without an answer, or harm the ones beside it.

    python -m tools.fuzz --requests 2000
    python -m tools.fuzz --url http://127.0.0.1:8000/v1 --seed 7

Starts a server on the benchmark's smallest model, takes valid bodies of each route, and damages them: fields dropped,
retyped, doubled, made huge or negative, strings with controls and lone surrogates, deep nesting, cut-off JSON, bytes
that are no text. Every answer must be a status the protocol knows with a JSON error that says something; a healthy
request is sent between them all the time; at the end the server must be healthy and hold nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_mlx.bench import servers
from vllm_mlx.bench.client import Endpoint, send
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.model import build

ANSWERS = {200, 400, 404, 405, 413, 415, 422, 429, 503, 504}
NUM_WORKERS = 8

TOOL = {"type": "function", "function": {"name": "look", "parameters": {
    "type": "object", "properties": {"at": {"type": "string"}}, "required": ["at"]}}}  # fmt: skip
BODIES: dict[str, list[dict[str, Any]]] = {
    "/chat/completions": [
        {"model": "default", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 3, "temperature": 0,
         "top_p": 0.9, "n": 1, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "seed": 1, "timeout": 20},
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": "a"}]}],
         "max_tokens": 2, "stream": True, "stream_options": {"include_usage": True}, "logit_bias": {"5": 1.5}},
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{\"at\": \"b\"}"}}]},
            {"role": "tool", "tool_call_id": "1", "content": "c"}], "tools": [TOOL], "tool_choice": "auto",
         "max_tokens": 2},
        {"messages": [{"role": "user", "content": "j"}], "max_tokens": 4, "response_format": {
            "type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
        {"messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}]}], "max_tokens": 2,
         "enable_thinking": False, "include_diagnostics": True, "diagnostics_level": "deep"},
    ],
    "/completions": [
        {"model": "default", "prompt": "hello", "max_tokens": 3, "echo": True, "logprobs": 1, "n": 2},
        {"prompt": [1, 2, 3], "max_tokens": 2, "stream": True, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"prompt": ["a", "b"], "max_tokens": 1, "min_p": 0.1, "top_k": 3, "repetition_penalty": 1.1},
    ],
    "/messages": [
        {"model": "default", "max_tokens": 3, "messages": [{"role": "user", "content": "hello"}], "system": "s",
         "stop_sequences": ["x"], "temperature": 0.5},
        {"model": "default", "max_tokens": 3, "stream": True, "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [
            {"name": "look", "input_schema": {"type": "object"}}]},
    ],
}  # fmt: skip

STRANGE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**70), 1e308, -0.0, 0.5, "", " ", "\x00", "\ud800", "\u202e",
    "💥" * 50, "a" * 20_000, [], [[]], {}, [None], {"a": {"a": {"a": {}}}}, "NaN", "1", [1, "a"],
    ["user"], {"type": "text"},
)  # fmt: skip


@dataclass
class Fuzz:
    """One run against one server; `problems` are sentences."""

    endpoint: Endpoint
    seed: int
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    async def run(self, num_requests: int) -> None:
        numbers = iter(range(num_requests))

        async def work() -> None:
            for number in numbers:
                await self._one(random.Random(f"{self.seed}.{number}"), number)

        await asyncio.gather(*(work() for _ in range(NUM_WORKERS)))
        await self._check_end()

    async def _one(self, rng: random.Random, number: int) -> None:
        route = rng.choice(list(BODIES))
        data = json.dumps(BODIES[route][0]).encode() if number % 20 == 0 else damaged(rng, rng.choice(BODIES[route]))
        try:
            transport, receiver = await send(self.endpoint, route, data)
            try:
                await asyncio.wait_for(asyncio.shield(receiver.closed), 60)
            finally:
                transport.close()
        except (OSError, TimeoutError) as error:
            self._problem(number, route, data, f"{type(error).__name__} {error}")
            return
        answer = b"".join(piece for _, piece in receiver.pieces)
        complaint = judge(answer, must_work=number % 20 == 0)
        self.counts[answer[9:12].decode(errors="replace")] += 1
        if complaint:
            self._problem(number, route, data, complaint)

    async def _check_end(self) -> None:
        root = self.endpoint.url.removesuffix("/v1")
        async with httpx.AsyncClient(base_url=root, timeout=60) as client:
            health = (await client.get("/health")).json()
            for _ in range(100):
                status = (await client.get("/v1/status")).json()
                if not (status["num_running"] or status["num_waiting"] or status["runtime"]["active_concurrency"]):
                    break
                await asyncio.sleep(0.1)
            else:
                self.problems.append(f"requests are left at the end: {status['requests']}")
            (await client.delete("/v1/cache")).raise_for_status()
            cache = (await client.get("/v1/status")).json()["cache"]
        if health["status"] != "healthy":
            self.problems.append(f"health is {health}")
        if cache["kv_bytes"] or cache["prefix_cache_bytes"]:
            self.problems.append(f"bytes are held at the end: {cache}")

    def _problem(self, number: int, route: str, data: bytes, what: str) -> None:
        self.counts["problems"] += 1
        if len(self.problems) < 20:
            self.problems.append(f"--seed {self.seed}, request {number}, {route}: {what}\n    {data[:400]!r}")


def judge(answer: bytes, *, must_work: bool) -> str | None:
    """What is wrong with an answer, if anything is."""
    head, _, body = answer.partition(b"\r\n\r\n")
    try:
        status = int(head[9:12])
    except ValueError:
        return f"no answer: {answer[:100]!r}"
    if status not in ANSWERS or (must_work and status != 200):
        return f"status {status}: {body[:300]!r}"
    if status == 200:
        return None
    try:
        error = json.loads(body)["error"]
        message, kind = error["message"], error["type"]
    except (ValueError, KeyError, TypeError):
        return f"status {status} without an error body: {body[:300]!r}"
    if not (isinstance(message, str) and message and isinstance(kind, str)):
        return f"status {status} with an empty error: {body[:300]!r}"
    return None if "Traceback" not in message else f"a traceback in the answer: {message[:200]}"


# ── damage ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def damaged(rng: random.Random, body: dict[str, Any]) -> bytes:
    """The body with one to three wounds; sometimes the JSON itself is broken."""
    wounded = copy.deepcopy(body)
    for _ in range(rng.randint(1, 3)):
        rng.choice(WOUNDS)(rng, wounded)
    data = json.dumps(wounded).encode()
    if rng.random() < 0.15:
        data = rng.choice(BREAKS)(rng, data)
    return data


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    found: list[tuple[Any, Any]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        found.append((value, key))
        found += places(child)
    return found


def _retype(rng: random.Random, body: dict[str, Any]) -> None:
    if spots := places(body):
        container, key = rng.choice(spots)
        container[key] = copy.deepcopy(rng.choice(STRANGE))


def _drop(rng: random.Random, body: dict[str, Any]) -> None:
    if spots := places(body):
        container, key = rng.choice(spots)
        del container[key]


def _add(rng: random.Random, body: dict[str, Any]) -> None:
    name = rng.choice([*{k for bodies in BODIES.values() for b in bodies for k in b}, "__proto__", "", "\x00"])
    body[name] = copy.deepcopy(rng.choice(STRANGE))


def _wrap(rng: random.Random, body: dict[str, Any]) -> None:
    if spots := places(body):
        container, key = rng.choice(spots)
        container[key] = [container[key]] if rng.random() < 0.5 else {"a": container[key]}


def _deepen(rng: random.Random, body: dict[str, Any]) -> None:
    deep: Any = 1
    for _ in range(rng.choice([20, 200, 900])):
        deep = [deep] if rng.random() < 0.5 else {"a": deep}
    body[rng.choice(["messages", "tools", "metadata", "response_format", "stop", "extra"])] = deep


def _number(rng: random.Random, body: dict[str, Any]) -> None:
    name = rng.choice(["max_tokens", "temperature", "top_p", "n", "top_logprobs", "logprobs", "seed", "timeout",
                       "top_k", "min_p", "presence_penalty", "repetition_penalty",
                       "max_completion_tokens"])  # fmt: skip
    body[name] = rng.choice([-1, 0, 1, 2, 1.5, 1e9, 2**40, -1e308, float("nan"), float("inf"), "3", None])


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _noise(rng: random.Random, data: bytes) -> bytes:
    position = rng.randrange(len(data))
    return data[:position] + bytes(rng.randrange(256) for _ in range(rng.randint(1, 4))) + data[position + 1 :]


def _other(rng: random.Random, data: bytes) -> bytes:
    return rng.choice([b"", b"null", b"[]", b"3", b'"x"', b"\xff\xfe{}", b"{" * 5000, b"[" * 100_000, data + data])


WOUNDS: Sequence[Callable[[random.Random, dict[str, Any]], None]] = (
    _retype, _retype, _retype, _drop, _add, _wrap, _deepen, _number, _number,
)  # fmt: skip
BREAKS: Sequence[Callable[[random.Random, bytes], bytes]] = (_cut, _noise, _other)


async def fuzz(*, num_requests: int, seed: int = 1, url: str | None = None, folder: Path | None = None) -> Fuzz:
    """Run and return the finished fuzz; a server is started when no URL is given, and its log is read."""
    async with AsyncExitStack() as stack:
        log = None
        if url is not None:
            test = Fuzz(Endpoint(url), seed)
        else:
            model = str(build(folder or default_folder(), "5m"))
            port = servers.free_port()
            log = Path(tempfile.mkdtemp(prefix="vllm-mlx-fuzz-")) / "server.log"
            command = servers.ours(model, port, ("--max-tokens", "8"))
            endpoint, _ = await stack.enter_async_context(servers.running(command, port, "default", log=log))
            test = Fuzz(endpoint, seed)
        await test.run(num_requests)
        if log is not None:
            lines = log.read_text(errors="replace").splitlines()
            test.problems += [f"the log says: {x}" for x in lines if " ERROR " in x or "Traceback" in x][:10]
        return test


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--url")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    test = asyncio.run(
        fuzz(num_requests=options.requests, seed=options.seed, url=options.url, folder=options.folder)
    )
    print(", ".join(f"{name}: {count}" for name, count in sorted(test.counts.items())))
    for problem in test.problems:
        print(f"PROBLEM: {problem}")
    return 1 if test.problems else 0


if __name__ == "__main__":
    sys.exit(main())
