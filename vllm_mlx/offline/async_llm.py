"""One loaded model on the caller's event loop: requests stream, run together, and end when their reader leaves.

The same parts as the server's, without HTTP: requests are checked by the OpenAI wire types, so what is refused there is
refused here with the same sentence (`InvalidRequest`).
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from vllm_mlx.api.errors import invalid_from
from vllm_mlx.api.openai.convert import chat_request, completion_request
from vllm_mlx.api.openai.schemas import ChatCompletionRequest, CompletionRequest
from vllm_mlx.backend import Backend
from vllm_mlx.generation.events import OutputEvent
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.offline.options import settings_of
from vllm_mlx.offline.outputs import CompletionOutput, RequestOutput
from vllm_mlx.offline.params import SamplingParams

Wire = TypeVar("Wire", bound=BaseModel)
CLOSE_TIMEOUT_S = 10.0


class AsyncLLM:
    """Make one with `await AsyncLLM.load(...)`; close it with `close`, or use it as an async context manager."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._service = backend.service

    @classmethod
    async def load(cls, model: str = "demo", **settings: Any) -> AsyncLLM:
        """A hub id, a folder or `demo`; `settings` are the server's, by name. Raises ModelLoadError, SettingsError."""
        backend = await asyncio.to_thread(Backend.load, settings_of(model, settings))
        backend.oversight.start(backend.engine)
        return cls(backend)

    @property
    def model(self) -> Any:
        """Facts of the model (`api.context.ServedModel`)."""
        return self._backend.model

    @property
    def max_num_seqs(self) -> int:
        return self._backend.settings.batch.max_num_seqs

    def describe(self) -> str:
        return self._backend.describe()

    async def generate(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None, request_id: str | None = None
    ) -> AsyncGenerator[RequestOutput, None]:
        """Complete a text or token ids. Yields the same object again and again, each time with more in it."""
        params = sampling_params or SamplingParams()
        shown = prompt if isinstance(prompt, str) else list(prompt)
        body = parse(CompletionRequest, {"prompt": shown, "logprobs": params.logprobs, **params.request_fields()})
        id = request_id or _make_id()
        requests = [
            completion_request(body, prompt, id=f"{id}-{i}", seed_offset=i) for i in range(max(1, params.n))
        ]
        async for output in self._stream(id, prompt if isinstance(prompt, str) else None, requests):
            yield output

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        **fields: Any,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Answer OpenAI messages. `fields` are more of a chat request's: tools, enable_thinking, response_format …"""
        params = sampling_params or SamplingParams()
        logprobs = {} if params.logprobs is None else {"logprobs": True, "top_logprobs": params.logprobs}
        given = {"messages": list(messages), **logprobs, **params.request_fields(), **fields}
        body = parse(ChatCompletionRequest, given)
        id = request_id or _make_id()
        requests = [chat_request(body, id=f"{id}-{i}", seed_offset=i) for i in range(max(1, params.n))]
        async for output in self._stream(id, None, requests):
            yield output

    async def events(
        self, messages: Sequence[Mapping[str, Any]], **fields: Any
    ) -> AsyncGenerator[OutputEvent, None]:
        """The events of one answer to OpenAI messages, as the server's streams are made of; `Finished` is the last."""
        body = parse(ChatCompletionRequest, {"messages": list(messages), **fields})
        async with aclosing(self._service.generate(chat_request(body, id=_make_id()))) as events:
            async for event in events:
                yield event

    async def abort(self, request_id: str) -> None:
        """End a request with what it has; an unknown id does nothing."""
        for index in range(128):
            if not self._service.cancel(f"{request_id}-{index}"):
                return

    async def close(self) -> None:
        """End what runs, and give the memory back."""
        self._backend.start_drain()
        await asyncio.to_thread(self._backend.close, CLOSE_TIMEOUT_S)

    async def __aenter__(self) -> AsyncLLM:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _stream(
        self, id: str, prompt: str | None, requests: Sequence[GenerationRequest]
    ) -> AsyncGenerator[RequestOutput, None]:
        output = RequestOutput(id, prompt, [CompletionOutput(i) for i in range(len(requests))])
        if len(requests) == 1:
            async with aclosing(self._service.generate(requests[0])) as events:
                async for event in events:
                    if output.take(0, event):
                        yield output
            return
        queue: asyncio.Queue[tuple[int, OutputEvent] | BaseException | None] = asyncio.Queue()

        async def drive(index: int, request: GenerationRequest) -> None:
            try:
                async with aclosing(self._service.generate(request)) as events:
                    async for event in events:
                        queue.put_nowait((index, event))
                queue.put_nowait(None)
            except Exception as error:  # handed to the reader, which raises it
                queue.put_nowait(error)

        tasks = [asyncio.create_task(drive(i, replace(request))) for i, request in enumerate(requests)]
        try:
            num_open = len(tasks)
            while num_open:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    num_open -= 1
                elif output.take(*item):
                    yield output
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


def parse(kind: type[Wire], fields: dict[str, Any]) -> Wire:
    """A wire type, or InvalidRequest with the sentence that the server would answer."""
    try:
        return kind(**{name: value for name, value in fields.items() if value is not None})
    except ValidationError as error:
        raise invalid_from(error.errors(include_url=False, include_context=False)) from None


def _make_id() -> str:
    return uuid.uuid4().hex[:16]
