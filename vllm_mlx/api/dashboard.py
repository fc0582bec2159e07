"""GET /v1/dashboard: all that the dashboard shows, as one stream of server-sent events.

    event: hello    capabilities, diagnostics, what finished and what went wrong lately; once
    event: tick     status and live requests, and what finished since the last tick; every second
    event: health   capabilities and diagnostics again; every ten seconds

Each open dashboard is one small task on the event loop; while nobody looks there is none, and nothing is collected
for it but the journal's last entries.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from itertools import islice
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from vllm_mlx.api import capabilities, control, health
from vllm_mlx.api.context import Phase, ServerContext, get_context
from vllm_mlx.observability.journal import Journal

router = APIRouter(tags=["Server"])

TICK_S = 1.0
HEALTH_EVERY = 10


@router.get(
    "/v1/dashboard",
    summary="What the dashboard shows, as a stream",
    description="Server-sent events: `hello`, then `tick` every second and `health` every ten.",
)
async def stream(http: Request, context: Annotated[ServerContext, Depends(get_context)]) -> Response:
    headers = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
    return StreamingResponse(events(context), media_type="text/event-stream", headers=headers)


async def events(context: ServerContext, *, tick_s: float = TICK_S) -> AsyncIterator[bytes]:
    """The stream's bytes, until the server drains. Closed from outside when the client leaves."""
    seen = _Seen(context.journal)
    yield _event("hello", {**describe(context), **seen.everything()})
    for number in range(1, 1 << 62):
        yield _event("tick", {**control.describe_status(context), "now": time.time(), **seen.news()})
        if number % HEALTH_EVERY == 0:
            yield _event("health", describe(context))
        if context.phase is Phase.DRAINING:
            return
        await asyncio.sleep(tick_s)


def describe(context: ServerContext) -> dict[str, Any]:
    """What changes rarely."""
    return {
        "capabilities": capabilities.describe(context),
        "diagnostics": health.describe_diagnostics(context),
        "models": [] if context.models is None else [_model(entry) for entry in context.models.entries()],
    }


def _model(entry: Any) -> dict[str, Any]:
    return {
        "id": entry.model.id,
        "state": entry.state,
        "pinned": entry.is_pinned,
        "active": entry.num_active,
        "waiting": entry.num_waiting,
        "bytes": entry.cost_bytes,
        "failure": entry.failure,
    }


class _Seen:
    """How much of the journal one dashboard has been sent."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._num_finished = journal.num_finished
        self._num_problems = journal.num_problems

    def everything(self) -> dict[str, Any]:
        journal = self._journal
        return self._entries(len(journal.finished), len(journal.problems))

    def news(self) -> dict[str, Any]:
        journal = self._journal
        num_finished = journal.num_finished - self._num_finished
        num_problems = journal.num_problems - self._num_problems
        self._num_finished, self._num_problems = journal.num_finished, journal.num_problems
        return self._entries(num_finished, num_problems)

    def _entries(self, num_finished: int, num_problems: int) -> dict[str, Any]:
        journal = self._journal
        return {
            "finished": [request.as_dict() for request in _last(journal.finished, num_finished)],
            "problems": [
                {"time": p.time, "source": p.source, "message": p.message, "request_id": p.request_id}
                for p in _last(journal.problems, num_problems)
            ],
            "miss_reasons": dict(journal.miss_reasons.most_common(8)),
        }


def _last(items: Any, number: int) -> list[Any]:
    return list(islice(items, max(0, len(items) - number), None))


def _event(name: str, data: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps({"event": name, **data}, default=str) + b"\n\n"
