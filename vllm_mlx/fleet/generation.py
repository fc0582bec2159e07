"""Generation with a model of the pool: the same protocol as a loaded model's own service, with a wait before it.

A request that finds its model unloaded waits for it, and says so in keep-alives once that takes long. asyncio thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any, Protocol, cast

from vllm_mlx.api.context import Generation
from vllm_mlx.errors import Cancelled, DeadlineExceeded, Unavailable
from vllm_mlx.fleet.pool import ModelPool
from vllm_mlx.generation.events import KeepAlive, OutputEvent
from vllm_mlx.generation.request import GenerationRequest

KEEP_ALIVE_S = 5.0
"""How long a wait is silent: until then a failed load is still answered with a status."""


class HasService(Protocol):
    @property
    def service(self) -> Generation: ...


class PooledGeneration:
    """`Generation` over one member of a pool."""

    def __init__(
        self, pool: ModelPool[Any], model_id: str, *, timeout_s: float, keep_alive_s: float = KEEP_ALIVE_S
    ) -> None:
        self._pool = pool
        self._model_id = model_id
        self._timeout_s = timeout_s
        self._keep_alive_s = keep_alive_s
        self._waiting: dict[str, asyncio.Task[HasService]] = {}

    async def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]:
        """The request's events, after the model's loading. Closing cancels, at any point."""
        async with AsyncExitStack() as stack:
            loop = asyncio.get_running_loop()
            deadline = loop.time() + min(request.timeout_s or self._timeout_s, self._timeout_s)
            entering = asyncio.ensure_future(stack.enter_async_context(self._pool.use(self._model_id)))
            self._waiting[request.id] = entering
            try:
                while not entering.done():
                    await asyncio.wait({entering}, timeout=min(self._keep_alive_s, deadline - loop.time()))
                    if entering.done():
                        break
                    if loop.time() >= deadline:
                        raise DeadlineExceeded(f"The request ran out of time while {self._model_id} was loading.")
                    yield KeepAlive("loading")
                loaded = entering.result()
            except asyncio.CancelledError:
                if entering.cancelled() and request.id not in self._waiting:
                    raise Cancelled("The request was cancelled while its model was loading.") from None
                raise
            finally:
                self._waiting.pop(request.id, None)
                await _give_up(entering)
            events = cast(AsyncGenerator[OutputEvent, None], loaded.service.generate(request))
            async with aclosing(events):
                async for event in events:
                    yield event

    def cancel(self, request_id: str) -> bool:
        """End a generation early; one whose model is still loading ends at once."""
        if (entering := self._waiting.pop(request_id, None)) is not None:
            return entering.cancel()
        loaded = self._pool.members[self._model_id].loaded
        return loaded is not None and loaded.service.cancel(request_id)

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        async with self._pool.use(self._model_id) as loaded:
            return int(await loaded.service.count_prompt_tokens(request))

    async def tokenize_prompt(self, request: GenerationRequest, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        async with self._pool.use(self._model_id) as loaded:
            ids: tuple[int, ...] = await loaded.service.tokenize_prompt(request, add_special_tokens=add_special_tokens)
            return ids

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        async with self._pool.use(self._model_id) as loaded:
            return str(await loaded.service.detokenize(token_ids))

    def token_text(self, token_id: int) -> str:
        """Text of one token; asked for within a request, while its model is in memory."""
        loaded = self._pool.members[self._model_id].loaded
        if loaded is None:
            raise Unavailable(f"{self._model_id} is not loaded now; try again.", retry_after_s=5)
        return str(loaded.service.token_text(token_id))


async def _give_up(entering: asyncio.Task[Any]) -> None:
    """Leave no wait behind when the client has left."""
    if not entering.done():
        entering.cancel()
        await asyncio.wait({entering})
