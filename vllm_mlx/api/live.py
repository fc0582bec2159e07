"""The generation requests that are being answered now, for `/v1/status` and the cancel endpoint. asyncio thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One HTTP request and the generations (`generation_ids`) it waits for; `base_model` is the model without adapter.

    `owner` may see it; `session` is the agent's own name of its conversation, `traceparent`
    the header of that name; `snapshot` gives the answer so far. `end` ends a request that has no generations.
    """

    id: str
    request_id: str
    route: str
    model: str
    is_stream: bool
    generation_ids: tuple[str, ...]
    client: str = ""
    base_model: str = ""
    owner: str = ""
    session: str = ""
    traceparent: str = ""
    snapshot: Callable[[], dict[str, Any]] | None = None
    end: Callable[[], object] | None = None
    started: float = field(default_factory=time.monotonic)
    cancelled_by_client: bool = False


class LiveRequests:
    """Live requests by answer id (`chatcmpl-…`), by `x-request-id` and by generation id."""

    def __init__(self) -> None:
        self._live: dict[str, LiveRequest] = {}
        self.num_finished = 0
        self.peak = 0

    def __len__(self) -> int:
        return len(self._live)

    def __iter__(self) -> Iterator[LiveRequest]:
        return iter(tuple(self._live.values()))

    @contextmanager
    def track(self, request: LiveRequest) -> Iterator[LiveRequest]:
        """The request is live inside the block."""
        self._live[request.id] = request
        self.peak = max(self.peak, len(self._live))
        try:
            yield request
        finally:
            del self._live[request.id]
            self.num_finished += 1

    def find(self, any_id: str) -> LiveRequest | None:
        """By any of its ids."""
        if found := self._live.get(any_id):
            return found
        for request in self._live.values():
            if any_id == request.request_id or any_id in request.generation_ids:
                return request
        return None

    def cancel(self, request: LiveRequest, cancel_generation: Callable[[str], bool]) -> None:
        """End the request's generations; its answer is what was generated so far."""
        request.cancelled_by_client = True
        for generation_id in request.generation_ids:
            cancel_generation(generation_id)
