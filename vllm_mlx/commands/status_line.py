"""One line at the foot of the terminal that says what `serve` does; log lines go above it. Nothing where none looks.

Runs on the event loop, once a second, and reads what `/v1/status` reads.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from typing import TextIO

from vllm_mlx.api.context import Phase, ServerContext
from vllm_mlx.guards.process_memory import process_bytes
from vllm_mlx.models.download import Bar

INTERVAL_S = 1.0
CLEAR = "\r\x1b[2K"


class StatusLine:
    """Shown while `run` runs. `is_wanted` tells whether the stream is a terminal that can show it."""

    def __init__(self, context: ServerContext, stream: TextIO) -> None:
        self._context = context
        self._stream = stream
        self._shown = ""
        self._started = time.monotonic()
        self._before: tuple[float, int, int] | None = None

    @staticmethod
    def is_wanted(stream: TextIO, log_format: str) -> bool:
        return log_format == "text" and stream.isatty()

    async def run(self) -> None:
        """Until cancelled; leaves no line behind."""
        try:
            while True:
                if not Bar.is_shown:
                    self.show(self.text(time.monotonic()))
                await asyncio.sleep(INTERVAL_S)
        finally:
            self.show("")

    def text(self, now: float) -> str:
        context = self._context
        if context.phase is Phase.LOADING:
            name = context.settings.model.model
            return f"loading {name} · {process_bytes() / 2**30:.1f} GiB in memory · {now - self._started:.0f} s"
        status = context.read_status()
        counts = (now, status.num_completion_tokens, status.num_prompt_tokens)
        before, self._before = self._before or counts, counts
        seconds = max(1e-9, now - before[0])
        parts = [
            f"{status.num_running} running",
            f"{status.num_waiting} waiting",
            f"{max(0, counts[1] - before[1]) / seconds:.0f} tokens/s",
            f"{max(0, counts[2] - before[2]) / seconds:.0f} prompt tokens/s",
        ]
        if status.num_prompt_tokens:
            parts.append(f"{100 * status.num_cached_tokens // status.num_prompt_tokens} % from cache")
        parts.append(f"{process_bytes() / 2**30:.1f} GiB")
        if context.phase is Phase.DRAINING:
            parts.insert(0, "shutting down")
        elif not status.is_healthy:
            parts.insert(0, f"the engine has failed: {status.failure}")
        return " · ".join(parts)

    def show(self, text: str) -> None:
        width = shutil.get_terminal_size().columns
        self._shown = text[: width - 1]
        self._stream.write(CLEAR + (f"\x1b[2m{self._shown}\x1b[0m" if self._shown else ""))
        self._stream.flush()

    def attach(self, handler: logging.StreamHandler[TextIO]) -> None:
        """Let a handler's lines be written above the status line."""
        handler.setStream(_Above(self, self._stream))  # type: ignore[arg-type]


class _Above:
    """A stream that takes the status line away, writes, and puts it back."""

    def __init__(self, line: StatusLine, stream: TextIO) -> None:
        self._line = line
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(CLEAR)
        written = self._stream.write(text)
        if text.endswith("\n"):
            self._line.show(self._line._shown)
        return written

    def flush(self) -> None:
        self._stream.flush()
