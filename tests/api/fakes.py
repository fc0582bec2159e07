"""A generation service that says what a test tells it, and an in-process HTTP client around the real application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from vllm_mlx.api.context import ServedModel, ServerContext
from vllm_mlx.app import build_app
from vllm_mlx.generation.events import (
    Accepted,
    Finished,
    GenerationUsage,
    LogprobEntry,
    LogprobsDelta,
    OutputEvent,
)
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.lifecycle import bind, make_http_server
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted
from vllm_mlx.settings import Settings

MODEL_ID = "test/model"


def finished(reason: str = "stop", **fields: Any) -> Finished:
    usage = fields.pop("usage", GenerationUsage(11, 7, num_cached_tokens=4, num_reasoning_tokens=2))
    return Finished(reason, usage, **fields)


def logprobs(*tokens: str) -> LogprobsDelta:
    entries = []
    for i, token in enumerate(tokens):
        top = tuple((t, t.encode(), -0.5 - j, j) for j, t in enumerate((token, "other")))
        entries.append(LogprobEntry(token, token.encode(), i, -0.5, top))
    return LogprobsDelta(tuple(entries))


def says(*texts: str, end: Finished | None = None) -> list[OutputEvent]:
    return [*(TextDelta(t) for t in texts), end or finished()]


def thinks(reasoning: str, answer: str) -> list[OutputEvent]:
    return [ReasoningDelta(reasoning), TextDelta(answer), finished()]


def calls(name: str, *arguments: str, id: str | None = None) -> list[OutputEvent]:
    deltas = [ToolCallDelta(0, piece) for piece in arguments]
    return [ToolCallStarted(0, name, id), *deltas, ToolCallEnded(0), finished("tool_calls")]


Script = Callable[[GenerationRequest], Sequence[OutputEvent | BaseException | Callable[[], Any]]]


@dataclass
class FakeGeneration:
    """`script` gives the events after Accepted; exceptions in it are raised, functions called (and awaited).

    `refusal` is raised before the first event. What was asked is in `requests`; what was ended early in `closed`.
    """

    script: Script = lambda request: says("Hello", " world")
    refusal: BaseException | None = None
    requests: list[GenerationRequest] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    running: set[str] = field(default_factory=set)
    cancel_events: dict[str, asyncio.Event] = field(default_factory=dict)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.running.add(request.id)
        self.cancel_events[request.id] = asyncio.Event()
        is_done = False
        try:
            yield Accepted(request.id, 11, (1, 2, 3))
            for event in self.script(request):
                if isinstance(event, BaseException):
                    raise event
                if callable(event):
                    result = event()
                    if asyncio.iscoroutine(result):
                        await result
                    continue
                is_done = isinstance(event, Finished)
                yield event
        finally:
            self.running.discard(request.id)
            if not is_done:
                self.closed.append(request.id)

    def cancel(self, request_id: str) -> bool:
        self.cancelled.append(request_id)
        if request_id not in self.running:
            return False
        self.cancel_events[request_id].set()
        return True

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        return len(await self.tokenize_prompt(request))

    async def tokenize_prompt(self, request: GenerationRequest, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        text = request.prompt if isinstance(request.prompt, str) else "".join(m.text for m in request.messages)
        assert isinstance(text, str)
        return (*((1,) if add_special_tokens else ()), *text.encode())

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return bytes(t for t in token_ids if t > 1).decode()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)


def make_context(service: Any = None, **fields: Any) -> ServerContext:
    settings = fields.pop("settings", Settings())
    model = fields.pop("model", ServedModel(id=MODEL_ID, fingerprint="fp", context_tokens=4096, vocab_size=300))
    return ServerContext(settings=settings, service=service or FakeGeneration(), model=model, **fields)


@asynccontextmanager
async def client_for(context: ServerContext, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client wired to the application in this process; nothing listens."""
    transport = httpx.ASGITransport(app=build_app(context), raise_app_exceptions=False, **options)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@asynccontextmanager
async def live_server(context: ServerContext) -> AsyncIterator[str]:
    """The application behind the real HTTP server on a free port of this machine; gives its address."""
    server = context.settings.with_values(server__port=0).server
    listener = bind(server)
    http = make_http_server(build_app(context), server)
    serving = asyncio.create_task(http.serve(sockets=[listener]))
    await until(lambda: http.started)
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        http.should_exit = True
        await serving


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something another task does; a test that waits in vain fails by its own limit."""
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL_ID, "messages": [{"role": "user", "content": "Hi"}], **fields}


def sse_payloads(text: str) -> list[Any]:
    """The data of each event of a stream; the last must be [DONE], which is left out."""
    data = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    assert data[-1] == "[DONE]", data
    return [json.loads(item) for item in data[:-1]]
