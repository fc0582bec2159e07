"""A place on the MLX thread for jobs of no engine: what `EngineThread` takes for an engine, without a model.

A pool's models beside the chat are loaded, computed and dropped there, whichever engines come and go. MLX thread only.
"""

from __future__ import annotations

import time

from vllm_mlx.engine.request import Request
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.errors import EngineError


class JobsOnly:
    """Never has anything to step; implements `thread.Steps`."""

    has_work = False
    num_decoding = 0

    def idle(self) -> bool:
        return False

    def share_thread(self, num_decoding_elsewhere: int) -> None:
        pass

    def step(self) -> None:
        pass

    def submit(self, request: Request) -> None:
        raise EngineError("a request was sent to where there is no model")

    def cancel(self, request_id: str) -> None:
        pass

    def cancel_all(self) -> None:
        pass

    def close(self) -> None:
        pass

    def now(self) -> float:
        return time.monotonic()

    def paused(self, seconds: float) -> None:
        pass

    def status(self) -> EngineStatus:
        return EngineStatus()
