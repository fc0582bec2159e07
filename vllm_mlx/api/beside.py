"""What every route beside the chat does alike: find the model, count the request as live, watch the client, take a
permit, keep the time. asyncio thread."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.requests import Request

from vllm_mlx.api.context import ServerContext
from vllm_mlx.api.errors import request_id_of
from vllm_mlx.api.live import LiveRequest
from vllm_mlx.api.requests import caller_of
from vllm_mlx.api.sse import watch_client
from vllm_mlx.errors import Cancelled, InvalidRequest
from vllm_mlx.generation.oneshot import BesideModel, OneShots

T = TypeVar("T")


def find_beside(context: ServerContext, task: str, name: str | None) -> BesideModel:
    """The model for a task; raises naming the flag when there is none, and for the name of another model."""
    served = context.require_model()
    found = context.beside.find(task, name, is_strict=context.settings.server.strict_model_id)
    if name == served.id and name != found.id:
        raise InvalidRequest(f"'{name}' is the chat model; '{found.id}' is for {task}.", param="model")
    return found


def require_oneshots(context: ServerContext) -> OneShots:
    assert context.oneshots is not None, "a ready server without its one-shot jobs"
    return context.oneshots


@asynccontextmanager
async def track(
    context: ServerContext, http: Request, model: BesideModel, route: str, *, is_stream: bool = False
) -> AsyncIterator[str]:
    """The request is live and timed inside the block, whose value is its id."""
    id = f"{route}-{uuid.uuid4().hex}"
    entry = LiveRequest(
        id=id,
        request_id=request_id_of(http.scope) or id,
        route=route,
        model=model.id,
        is_stream=is_stream,
        generation_ids=(),
        client=caller_of(http).name,
    )
    started = time.monotonic()
    task = asyncio.current_task()
    assert task is not None
    entry.end = task.cancel
    with context.live.track(entry):
        try:
            yield id
        except asyncio.CancelledError:
            if not entry.cancelled_by_client:
                raise
            task.uncancel()
            raise Cancelled("The request was cancelled.") from None
    context.metrics.beside_latency.labels(task=model.task).observe(time.monotonic() - started)


@dataclass(frozen=True)
class Job:
    """One request to a model beside the chat: its id, and what does its jobs."""

    id: str
    service: Any


@asynccontextmanager
async def beside_job(
    context: ServerContext, http: Request, model: BesideModel, route: str, *, is_stream: bool = False
) -> AsyncIterator[Job]:
    """`track`, and inside it a permit, the time limit, the model (which may have to be loaded), and, unless it is a
    stream, which sees to that itself, an end when the client leaves."""
    async with (
        track(context, http, model, route, is_stream=is_stream) as id,
        nullcontext() if is_stream else watch_client(http.receive),
        require_oneshots(context).admitted(),
        model.use() as service,
    ):
        yield Job(id, service)


async def open_stream(http: Request, events: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """The events, once the first is there: an error before it has a status of its own."""
    try:
        async with watch_client(http.receive):
            first = await anext(events)
    except BaseException:  # raised again; an error or a cancellation ends what runs
        await events.aclose()
        raise
    return _chain(first, events)


async def _chain(first: T, rest: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item
