"""Computations beside the chat (embeddings, scores, audio): admitted, bounded in time, and done in slices on the MLX
thread between the engine's steps. Event loop only.

A slice should take no longer than a part of the gap that a stream may show; how much fits is learnt by `Pace`. At most
one slice waits for the MLX thread at any time, whatever is asked at once, so that at most one runs between two steps;
concurrent jobs take turns slice by slice.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from vllm_mlx.errors import DeadlineExceeded, InvalidRequest, UnknownModel
from vllm_mlx.generation.admission import Admission
from vllm_mlx.generation.engine_port import EnginePort

log = logging.getLogger(__name__)
T = TypeVar("T")
_END: Any = object()

SHARE_OF_GAP = 0.5
"""Of the gap between two tokens that is allowed, what a slice may take; the step itself needs the rest."""

FLAGS = {
    "embedding": "--embedding-model",
    "rerank": "--rerank-model",
    "transcription": "--stt-model",
    "speech": "--tts-model",
}
"""Task → the flag that gives the server a model for it."""


@dataclass(frozen=True)
class BesideModel:
    """A model for one task. What does its jobs (an `EncodingService`, say) is had by `use`.

    It is `service` for a model that stays loaded; one of a pool is loaded by `enter` and stays for the length of the
    block. `nbytes` are its weights'.
    """

    id: str
    task: str
    service: Any
    nbytes: int
    created: int = field(default_factory=lambda: int(time.time()))
    aliases: tuple[str, ...] = ()
    enter: Callable[[], AbstractAsyncContextManager[Any]] | None = None

    @asynccontextmanager
    async def use(self) -> AsyncIterator[Any]:
        """The service; raises ModelLoadError when a model of a pool cannot be loaded."""
        if self.enter is None:
            yield self.service
            return
        async with self.enter() as service:
            yield service


class BesideModels:
    """The models beside the served one. Read only while the server runs."""

    def __init__(self, models: Sequence[BesideModel] = ()) -> None:
        self._models = tuple(models)

    def __iter__(self) -> Iterator[BesideModel]:
        return iter(self._models)

    def named(self, model_id: str | None) -> list[BesideModel]:
        """Those of a name: seldom more than one, as a name may stand for two tasks."""
        return [model for model in self if model_id in (model.id, *model.aliases)]

    def of_task(self, task: str) -> BesideModel | None:
        return next((model for model in self if model.task == task), None)

    def find(self, task: str, name: str | None, *, is_strict: bool = False) -> BesideModel:
        """The model for a task. Any name will do unless the server is strict, or the name is another model's."""
        if named := self.named(name):
            for model in named:
                if model.task == task:
                    return model
            raise InvalidRequest(f"The model '{name}' is served for {named[0].task}, not for {task}.", param="model")
        found = self.of_task(task)
        if found is None:
            raise UnknownModel(
                f"This server has no model for {task}; start it with {FLAGS[task]} MODEL.", param="model"
            )
        if is_strict:
            raise UnknownModel(f"The model '{name}' is not served here for {task}; '{found.id}' is.", param="model")
        return found


@dataclass
class Pace:
    """How much work fits in a slice, learnt from slices seen. The unit of work is a padded token, or any other."""

    target_s: float
    seconds_per_unit: float | None = None
    first_units: int = 512
    max_units: int = 32768

    @property
    def units(self) -> int:
        if self.seconds_per_unit is None:
            return self.first_units
        return max(1, min(self.max_units, int(self.target_s / self.seconds_per_unit)))

    def take(self, lengths: Sequence[int]) -> int:
        """Of rows sorted by length, how many of the first to compute together: at least one."""
        units = self.units
        count = 1
        while count < len(lengths) and (count + 1) * lengths[count] <= units:
            count += 1
        return count

    def observe(self, units: int, seconds: float) -> None:
        cost = max(seconds, 1e-6) / max(1, units)
        known = self.seconds_per_unit
        self.seconds_per_unit = cost if known is None else known + 0.3 * (cost - known)


class OneShots:
    """Runs jobs beside the chat: who may come in, for how long, and when each slice runs."""

    def __init__(
        self, engine: EnginePort, admission: Admission, *, timeout_s: float, stall_target_s: float, num_workers: int = 1
    ) -> None:
        self._engine = engine
        self._admission = admission
        self._timeout_s = timeout_s
        self._turn = asyncio.Lock()
        self._closing: set[asyncio.Future[None]] = set()
        # One worker: a tokenizer is not to be used by two threads at once.
        self._workers: Executor = ThreadPoolExecutor(num_workers, "oneshot")
        self.slice_s = stall_target_s * SHARE_OF_GAP

    @asynccontextmanager
    async def admitted(self) -> AsyncIterator[None]:
        """A permit and a time limit around one request; raises `Overloaded`, `Unavailable`, `DeadlineExceeded`."""
        async with self._admission.permit():
            try:
                async with asyncio.timeout(self._timeout_s):
                    yield
            except TimeoutError as error:
                raise DeadlineExceeded(f"The request took longer than {self._timeout_s:g} s (--timeout).") from error

    async def slice(self, job: Callable[[], T]) -> tuple[T, float]:
        """Run `job` on the MLX thread between two steps, in its turn; its result and the seconds it took."""

        def timed() -> tuple[T, float]:
            started = time.perf_counter()
            result = job()
            return result, time.perf_counter() - started

        async with self._turn:
            return await self._engine.call(timed)

    async def iterate(self, start: Callable[[], Iterator[T]]) -> AsyncGenerator[T, None]:
        """What an iterator gives that is made and lives on the MLX thread: each `next` is a slice. Closing ends it."""
        iterator, _ = await self.slice(start)
        try:
            while (item := (await self.slice(lambda: next(iterator, _END)))[0]) is not _END:
                yield cast(T, item)
        finally:
            # Not awaited: whoever leaves early does not wait for the slice that may still run.
            closing = asyncio.ensure_future(self._engine.call(lambda: _close(iterator)))
            self._closing.add(closing)
            closing.add_done_callback(self._closed)

    async def in_worker(self, job: Callable[[], T]) -> T:
        """Run `job`, which knows nothing of MLX, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, job)

    def _closed(self, task: asyncio.Future[None]) -> None:
        self._closing.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.debug("an iterator was not closed: %s", task.exception())  # the engine has stopped

    def start_drain(self) -> None:
        """From now on nothing new is admitted (shutdown)."""
        self._admission.start_drain()

    def close(self) -> None:
        self._workers.shutdown(wait=False, cancel_futures=True)


def _close(iterator: Iterator[Any]) -> None:
    if isinstance(iterator, Generator):
        iterator.close()
