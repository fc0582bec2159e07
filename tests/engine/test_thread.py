"""The MLX thread: streams, jobs, cancellation and its end, on the fake engine. No sleeps; every wait has an event."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import pytest

from tests.simulation.fake_model import FakeRunner, lone_run
from vllm_mlx.engine.engine import Engine, Publish
from vllm_mlx.engine.jobs import JobsOnly
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.request import Prompt, Request
from vllm_mlx.engine.scheduler import FixedChunk, Limits, Scheduler
from vllm_mlx.engine.step import FinishReason, TokenEvent
from vllm_mlx.engine.thread import EngineThread, MlxThread
from vllm_mlx.errors import EngineError, Unavailable


class Gate:
    """Stands before each launch: closed, the MLX thread waits there; `waiting` tells that it does.

    The fake engine steps thousands of times while a loaded machine lets the test wait for its turn, so a test that acts
    on a running request closes the gate after a few launches, acts, and opens it.
    """

    def __init__(self) -> None:
        self.open = threading.Event()
        self.open.set()
        self.waiting = threading.Event()
        self.error: Exception | None = None
        self._launches_left: int | None = None

    def close_after(self, num_launches: int) -> None:
        """Let so many launches pass. Call it before the first request."""
        self._launches_left = num_launches

    async def is_held(self) -> bool:
        return await asyncio.to_thread(self.waiting.wait, 10)

    def __call__(self, where: str) -> None:
        if where == "launch" and self._launches_left is not None:
            self._launches_left -= 1
            if self._launches_left < 0:
                self.open.clear()
                self._launches_left = None
        if not self.open.is_set():
            self.waiting.set()
            assert self.open.wait(10)
        if self.error is not None:
            raise self.error


class World:
    def __init__(self, *, max_rows: int = 8, thread: MlxThread | None = None) -> None:
        self.gate = Gate()
        self.max_rows = max_rows
        self.thread = EngineThread(self.build, thread)
        self.engine: Engine | None = None

    def build(self, publish: Publish) -> Engine:
        runner = FakeRunner(is_hybrid=False, fault=self.gate)
        scheduler = Scheduler(
            runner,
            PrefixCache(block_size=4, budget_bytes=10_000),
            Limits(self.max_rows, 100_000),
            max_tokens_per_step=64,
            chunk_sizer=FixedChunk(16),
            block_size=4,
        )
        self.engine = Engine(scheduler, runner, publish)
        return self.engine


@contextmanager
def running(**options) -> Iterator[World]:
    world = World(**options)
    world.thread.start().result(10)
    try:
        yield world
    finally:
        world.gate.open.set()
        assert world.thread.stop(10), "the thread did not end"


def request(request_id: str, max_tokens: int = 6, prompt=range(10)) -> Request:
    return Request(request_id, Prompt(tuple(prompt)), max_tokens)


async def read(thread: EngineThread, item: Request) -> list[TokenEvent]:
    return [event async for event in thread.stream(item)]


def tokens(events: list[TokenEvent]) -> list[int]:
    return [t for event in events for t in event.token_ids]


def finals(events: list[TokenEvent]) -> list[FinishReason]:
    return [event.finish_reason for event in events if event.finish_reason is not None]


async def test_many_streams_get_their_own_answers_and_one_final_event_each() -> None:
    with running() as world:
        items = [request(f"r{i}", 3 + i % 5, range(i, i + 12)) for i in range(30)]
        answers = await asyncio.gather(*(read(world.thread, item) for item in items))
    for item, events in zip(items, answers, strict=True):
        assert tokens(events) == lone_run(item, is_hybrid=False)
        assert finals(events) == [FinishReason.LENGTH] and events[-1].finish_reason is not None


async def test_leaving_a_stream_early_cancels_its_request() -> None:
    with running() as world:
        world.gate.close_after(8)
        stream = world.thread.stream(request("r", 100_000))
        await anext(stream)
        assert await world.gate.is_held()
        await stream.aclose()
        world.gate.open.set()
        await world.thread.call(lambda: None)
        status = await world.thread.call(lambda: world.engine.status())
        assert status.num_running == 0 and status.kv_bytes == 0


async def test_cancel_by_id_gives_the_stream_its_final_event() -> None:
    with running() as world:
        world.gate.close_after(8)
        stream = world.thread.stream(request("r", 100_000))
        await anext(stream)
        assert await world.gate.is_held()
        world.thread.cancel("r")
        world.gate.open.set()
        rest = [event async for event in stream]
        assert finals(rest) == [FinishReason.CANCELLED]


async def test_a_cancel_posted_behind_its_submit_is_never_lost() -> None:
    with running() as world:
        world.gate.open.clear()
        reading = asyncio.create_task(read(world.thread, request("r", 100_000)))
        await asyncio.sleep(0)
        world.thread.cancel("r")
        world.gate.open.set()
        assert finals(await reading) == [FinishReason.CANCELLED]


async def test_a_second_stream_of_a_running_id_is_refused_and_the_first_goes_on() -> None:
    with running() as world:
        world.gate.close_after(8)
        item = request("r", 40)
        stream = world.thread.stream(item)
        events = [await anext(stream)]
        assert await world.gate.is_held()
        with pytest.raises(EngineError, match="running"):
            await anext(world.thread.stream(item))
        world.gate.open.set()
        events += [event async for event in stream]
        assert tokens(events) == lone_run(item, is_hybrid=False)


async def test_a_job_runs_on_the_mlx_thread_between_two_steps() -> None:
    with running() as world:
        world.gate.close_after(8)
        stream = world.thread.stream(request("r", 100_000))
        await anext(stream)
        assert await world.gate.is_held()
        job = world.thread.submit_job(lambda: threading.current_thread().name)
        assert not job.done()  # the thread stands in a launch
        world.gate.open.set()
        name = await asyncio.wrap_future(job)
        before = (await anext(stream)).token_ids
        assert name == "mlx" and before
        await stream.aclose()


async def test_who_waited_for_a_job_sees_in_the_status_what_it_changed() -> None:
    with running() as world:
        await read(world.thread, request("r", 10))
        assert world.thread.status.prefix_cache_bytes > 0
        await world.thread.call(lambda: world.engine.scheduler.prefixes.cache.clear())
        assert world.thread.status.prefix_cache_bytes == 0


async def test_a_job_that_raises_tells_only_who_asked() -> None:
    with running() as world:
        with pytest.raises(ZeroDivisionError):
            await world.thread.call(lambda: 1 // 0)
        assert finals(await read(world.thread, request("r"))) == [FinishReason.LENGTH]


async def test_idle_moments_are_offered_again_after_each_message() -> None:
    with running() as world:
        offered = threading.Semaphore(0)
        world.engine.on_idle.append(lambda: offered.release() is not None)
        for _ in range(3):
            await world.thread.call(lambda: None)
            assert await asyncio.to_thread(offered.acquire, timeout=10)


async def test_an_idle_engine_is_offered_the_moment_again_when_nobody_writes() -> None:
    with running(thread=MlxThread(idle_again_s=0.01)) as world:
        offered = threading.Semaphore(0)
        await world.thread.call(lambda: world.engine.on_idle.append(lambda: offered.release() is not None))
        for _ in range(3):
            assert await asyncio.to_thread(offered.acquire, timeout=10)
        assert finals(await read(world.thread, request("r"))) == [FinishReason.LENGTH]


async def test_stop_ends_the_thread_while_requests_are_pending_and_answers_them() -> None:
    with running(max_rows=1) as world:
        world.gate.close_after(8)
        streams = [world.thread.stream(request(f"r{i}", 100_000)) for i in range(3)]
        await anext(streams[0])
        rest = [asyncio.create_task(anext(stream)) for stream in streams[1:]]
        assert await world.gate.is_held()
        assert not await asyncio.to_thread(world.thread.stop, 0.01)  # posted, while a launch is held
        world.gate.open.set()
        assert await asyncio.to_thread(world.thread.stop, 10)
        assert not world.thread.is_alive
        events = [event async for event in streams[0]]
        assert finals(events) == [FinishReason.CANCELLED]
        for task in rest:
            assert (await task).finish_reason is not None


async def test_a_thread_stuck_in_a_step_is_said_to_be() -> None:
    with running() as world:
        world.gate.open.clear()
        reading = asyncio.create_task(read(world.thread, request("r", 5)))
        assert await world.gate.is_held()
        assert not world.thread.stop(0.01)
        world.gate.open.set()
        assert len(finals(await reading)) == 1


async def test_after_stop_streams_and_jobs_are_refused() -> None:
    with running() as world:
        world.thread.stop(10)
        with pytest.raises(Unavailable):
            await anext(world.thread.stream(request("r")))
        with pytest.raises(Unavailable):
            await world.thread.call(lambda: None)


async def test_jobs_queued_behind_stop_are_answered() -> None:
    with running() as world:
        world.gate.open.clear()
        reading = asyncio.create_task(read(world.thread, request("r", 5)))
        assert await world.gate.is_held()
        stopping = asyncio.create_task(asyncio.to_thread(world.thread.stop, 10))
        await asyncio.sleep(0.05)  # let Stop reach the inbox first; either order must be answered
        late = world.thread.submit_job(lambda: "done")
        world.gate.open.set()
        assert await stopping
        with pytest.raises(Unavailable):
            await asyncio.wait_for(asyncio.wrap_future(late), 10)
        await reading


async def test_a_fault_of_the_loop_itself_leaves_nobody_waiting() -> None:
    with running() as world:
        world.engine.before_plan.append(lambda now: 1 // 0)
        events = await asyncio.wait_for(read(world.thread, request("r")), 10)
        assert finals(events) == [FinishReason.ERROR]
        assert not world.thread.status.is_healthy and "ZeroDivisionError" in world.thread.status.failure
        with pytest.raises(Unavailable):
            await anext(world.thread.stream(request("s")))


async def test_two_failed_steps_answer_everybody_and_the_status_says_so() -> None:
    with running(max_rows=1) as world:
        world.gate.error = RuntimeError("no device")
        answers = await asyncio.gather(*(read(world.thread, request(f"r{i}")) for i in range(5)))
        assert all(finals(events) == [FinishReason.ERROR] for events in answers)
        await world.thread.call(lambda: None)
        assert not world.thread.status.is_healthy and "no device" in world.thread.status.failure


def test_an_engine_that_cannot_be_built_tells_who_started_it() -> None:
    def build(publish: Publish) -> Engine:
        raise ValueError("no such model")

    thread = EngineThread(build)
    with pytest.raises(ValueError, match="no such model"):
        thread.start().result(10)
    assert not thread.status.is_healthy and thread.status.failure == "no such model" and not thread.is_alive


def test_before_the_engine_is_built_the_status_says_that_it_loads() -> None:
    release = threading.Event()
    world = World()

    def build(publish: Publish) -> Engine:
        assert release.wait(10)
        return world.build(publish)

    thread = EngineThread(build)
    ready = thread.start()
    assert not ready.done() and "loading" in thread.status.failure
    release.set()
    ready.result(10)
    assert thread.status.is_healthy and thread.stop(10)


def test_streams_of_two_event_loops_do_not_meet() -> None:
    with running() as world:
        found: dict[int, list[int]] = {}

        def client(number: int) -> None:
            found[number] = tokens(asyncio.run(read(world.thread, request(f"r{number}", 9, range(number, number + 9)))))

        clients = [threading.Thread(target=client, args=(number,)) for number in range(4)]
        for item in clients:
            item.start()
        for item in clients:
            item.join(10)
    for number in range(4):
        assert found[number] == lone_run(request("x", 9, range(number, number + 9)), is_hybrid=False)


# ── several engines on one thread ───────────────────────────────────────────────────────────────────────────────────


async def test_engines_on_one_thread_answer_at_once_and_are_not_mixed_up() -> None:
    shared = MlxThread()
    with running(thread=shared) as one, running(thread=shared) as two:
        items = [request(f"r{i}", 20, range(i, i + 12)) for i in range(6)]
        worlds = [one, two] * 3
        answers = await asyncio.gather(*(read(w.thread, item) for w, item in zip(worlds, items, strict=True)))
        assert await one.thread.call(threading.get_ident) == await two.thread.call(threading.get_ident)
    for item, events in zip(items, answers, strict=True):
        assert tokens(events) == lone_run(item, is_hybrid=False)


async def test_engines_step_in_turns_and_know_how_many_rows_the_others_decode() -> None:
    shared = MlxThread()
    steps: list[str] = []
    with running(thread=shared) as one, running(thread=shared) as two:
        heard: list[int] = []
        await two.thread.call(lambda: two.engine.on_sharing.append(heard.append))
        one.gate.close_after(3)
        first = asyncio.create_task(read(one.thread, request("a", 30)))
        assert await one.gate.is_held()
        second = asyncio.create_task(read(two.thread, request("b", 30)))
        for name, world in (("one", one), ("two", two)):
            world.engine.before_plan.append(lambda now, name=name: steps.append(name))
        await asyncio.sleep(0)  # the second request is in the inbox before the first engine goes on
        one.gate.open.set()
        await asyncio.gather(first, second)
    both = steps[: 2 * min(steps.count("one"), steps.count("two")) - 4]
    assert len(both) > 20 and all(a != b for a, b in zip(both, both[1:], strict=False))
    assert 1 in heard and set(heard) <= {0, 1}


async def test_the_end_of_one_engine_leaves_the_others_running_and_the_thread_takes_new_ones() -> None:
    shared = MlxThread()
    with running(thread=shared) as one:
        with running(thread=shared) as two:
            two.engine.before_plan.append(lambda now: 1 // 0)
            assert finals(await read(two.thread, request("b"))) == [FinishReason.ERROR]
            with pytest.raises(Unavailable):
                await two.thread.call(lambda: None)
            assert finals(await read(one.thread, request("a"))) == [FinishReason.LENGTH]
        with running(thread=shared) as three:
            assert finals(await read(three.thread, request("c"))) == [FinishReason.LENGTH]
        assert finals(await read(one.thread, request("d"))) == [FinishReason.LENGTH]
    with running(thread=shared) as later:  # the thread had ended with its last engine
        assert finals(await read(later.thread, request("e"))) == [FinishReason.LENGTH]


async def test_an_ended_engine_lets_go_of_what_it_held() -> None:
    with running(thread=MlxThread()) as world:
        await read(world.thread, request("a"))
        engine = weakref.ref(world.engine)
        world.engine = None
        assert world.thread.stop(10)
        gc.collect()
        assert engine() is None


def test_a_stopped_thread_is_over_with_all_that_mlx_compiled_on_it() -> None:
    """Its compile cache holds Python objects: an interpreter that ended before it did would abort the process."""
    compiled = [mx.compile(lambda x, i=i: mx.exp(x + i)) for i in range(20)]

    def compute() -> int:
        for function in compiled:
            mx.eval(function(mx.ones(3)))
        return threading.get_native_id()

    for _ in range(10):
        engine = EngineThread(lambda publish: JobsOnly())
        engine.start().result()
        native_id = engine.submit_job(compute).result()
        assert engine.stop(10)
        assert not Path(f"/proc/self/task/{native_id}").exists()


class PausedJobs(JobsOnly):
    """Takes note of what it is told of others' jobs."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def paused(self, seconds: float) -> None:
        self.seconds += seconds


def test_jobs_run_without_any_model_and_their_time_is_not_blamed_on_the_threads_other_engines() -> None:
    thread, told = MlxThread(), PausedJobs()
    first, second = EngineThread(lambda publish: told, thread), EngineThread(lambda publish: JobsOnly(), thread)
    first.start().result()
    second.start().result()

    def work() -> str:
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            pass
        return threading.current_thread().name

    own = first.submit_job(lambda: told.seconds).result()
    assert second.submit_job(work).result() == "mlx"
    assert first.submit_job(lambda: told.seconds).result() >= own + 0.01
    assert first.stop() and second.stop() and second.submit_job(work).exception() is not None
