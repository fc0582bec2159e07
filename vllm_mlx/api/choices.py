"""The generations behind one HTTP request, as one stream of (index, event): `n` choices, or several prompts.

One generation is passed through; several run concurrently, each driven by a task of its own; where the order of the
bytes is promised, they are shown one after the other. asyncio thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing

from vllm_mlx.api.context import Generation
from vllm_mlx.api.live import LiveRequest, LiveRequests
from vllm_mlx.errors import DeadlineExceeded, EngineError, Unavailable
from vllm_mlx.generation.events import Accepted, Finished, KeepAlive, Message, OutputEvent, collect
from vllm_mlx.generation.request import GenerationRequest
from vllm_mlx.observability.journal import Journal, RequestFacts

Indexed = tuple[int, OutputEvent]

_BEFORE_OUTPUT = (Accepted, KeepAlive)


async def open_choices(
    service: Generation,
    requests: Sequence[GenerationRequest],
    *,
    live: LiveRequests,
    entry: LiveRequest,
    journal: Journal,
    in_turn: bool = False,
) -> AsyncGenerator[Indexed, None]:
    """Start the generations. Returns when each has given its first event; raises the first error there was.

    The caller must iterate the result or `aclose()` it; both end what is still running.
    """
    events = _tracked(service, requests, live, entry, journal, in_turn)
    try:
        first = await anext(events)
    except BaseException:  # raised again; an error or a cancellation ends what runs
        await events.aclose()
        raise
    return _chain(first, events)


async def _chain(first: Indexed, rest: AsyncGenerator[Indexed, None]) -> AsyncGenerator[Indexed, None]:
    async with aclosing(rest):
        yield first
        async for item in rest:
            yield item


async def _tracked(
    service: Generation,
    requests: Sequence[GenerationRequest],
    live: LiveRequests,
    entry: LiveRequest,
    journal: Journal,
    in_turn: bool,
) -> AsyncGenerator[Indexed, None]:
    with live.track(entry):
        timers = [journal.start(_facts(entry, request)) for request in requests]
        source = _single(service.generate(requests[0])) if len(requests) == 1 else _merged(service, requests)
        if in_turn:
            source = _in_order(source, len(requests))
        try:
            async with aclosing(source):
                async for index, event in source:
                    if type(event) is Finished:
                        timers[index].finished(event.reason, event.usage, event.diagnostics, event.error)
                        _raise_failure(event, entry)
                    elif type(event) not in _BEFORE_OUTPUT:
                        timers[index].output()
                    yield index, event
        finally:
            for timer in timers:
                timer.close()


def _facts(entry: LiveRequest, request: GenerationRequest) -> RequestFacts:
    return RequestFacts(  # fmt: skip
        request.id, entry.request_id, entry.route, entry.model, entry.client, entry.session, entry.is_stream,
        entry.traceparent,
    )


def _raise_failure(event: Finished, entry: LiveRequest) -> None:
    """A generation that failed after its start; a cancel the client asked for is no failure."""
    if event.reason == "error":
        raise EngineError(event.error or "The engine failed while it generated this answer.")
    if event.reason == "deadline":
        raise DeadlineExceeded(event.error or event.detail or "The request ran out of time.")
    if event.reason == "cancelled" and not entry.cancelled_by_client:
        raise Unavailable(event.error or event.detail or "The server ended this request; it is shutting down.")


async def _single(events: AsyncIterator[OutputEvent]) -> AsyncGenerator[Indexed, None]:
    try:
        async for event in events:
            yield 0, event
    finally:
        await _close(events)


async def _in_order(events: AsyncGenerator[Indexed, None], num_choices: int) -> AsyncGenerator[Indexed, None]:
    """The same events, all of one choice before any of the next."""
    waiting: list[list[OutputEvent]] = [[] for _ in range(num_choices)]
    current = 0
    async with aclosing(events):
        async for index, event in events:
            waiting[index].append(event)
            while current < num_choices and waiting[current]:
                shown = waiting[current].pop(0)
                yield current, shown
                current += type(shown) is Finished


async def _merged(service: Generation, requests: Sequence[GenerationRequest]) -> AsyncGenerator[Indexed, None]:
    """Events of all generations as they come, but none before each has given its first: errors come before headers."""
    queue: asyncio.Queue[Indexed | BaseException | None] = asyncio.Queue()
    waiting_first = len(requests)
    opened = asyncio.Event()

    async def drive(index: int, request: GenerationRequest) -> None:
        nonlocal waiting_first
        is_first = True
        events = service.generate(request)
        try:
            async for event in events:
                if is_first:
                    is_first = False
                    waiting_first -= 1
                    if not waiting_first:
                        opened.set()
                queue.put_nowait((index, event))
            queue.put_nowait(None)
        except Exception as error:  # handed to the reader, which raises it
            queue.put_nowait(error)
            opened.set()
        finally:
            await _close(events)

    tasks = [asyncio.create_task(drive(i, request)) for i, request in enumerate(requests)]
    try:
        await opened.wait()
        if waiting_first:
            # One failed before all had begun: its error is somewhere in the queue.
            while not queue.empty():
                if isinstance(item := queue.get_nowait(), BaseException):
                    raise item
        num_open = len(tasks)
        while num_open:
            item = await queue.get()
            if item is None:
                num_open -= 1
            elif isinstance(item, BaseException):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _close(events: AsyncIterator[OutputEvent]) -> None:
    if isinstance(events, AsyncGenerator):
        await events.aclose()


async def collect_choices(events: AsyncGenerator[Indexed, None], num_choices: int) -> list[Message]:
    """Fold a stream into one message per choice: the same events that a streamed answer is made of."""
    lists: list[list[OutputEvent]] = [[] for _ in range(num_choices)]
    async with aclosing(events):
        async for index, event in events:
            lists[index].append(event)
    return [await collect(_replay(items)) for items in lists]


async def _replay(items: Sequence[OutputEvent]) -> AsyncIterator[OutputEvent]:
    for item in items:
        yield item
