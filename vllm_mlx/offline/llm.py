"""Batches for scripts: `LLM` runs an `AsyncLLM` on a thread of its own and waits for it.

    from vllm_mlx import LLM, SamplingParams
    with LLM("mlx-community/Qwen3-4B-Instruct-2507-4bit") as llm:
        for output in llm.generate(["Hello,", "The sea is"], SamplingParams(max_tokens=32)):
            print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from vllm_mlx.offline.async_llm import AsyncLLM
from vllm_mlx.offline.outputs import RequestOutput
from vllm_mlx.offline.params import SamplingParams

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]
Conversation = Sequence[Mapping[str, Any]]


class LLM:
    """A loaded model. Every method waits; threads may share it. `settings` are those of `vllm-mlx serve`, by name."""

    def __init__(self, model: str = "demo", **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        try:
            self._llm: AsyncLLM | None = self._wait(AsyncLLM.load(model, **settings))
        except BaseException:  # raised again; nobody could close what was not made
            self._stop_loop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Complete texts, token ids (`{"prompt_token_ids": [...]}`, or lists of numbers), one or many, together.

        Answers come in the order of the prompts. A progress line is shown on a terminal. Raises InvalidRequest.
        """
        items = [_prompt(item) for item in _many(prompts)]
        params = _params(sampling_params, len(items))
        llm = self._open()
        return self._all([lambda i=i: llm.generate(items[i], params[i]) for i in range(len(items))], use_tqdm)  # type: ignore[misc]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation or many (OpenAI messages, pictures too). `fields`: tools, enable_thinking …"""
        is_one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: list[Any] = [messages] if is_one else list(messages)
        params = _params(sampling_params, len(conversations))
        llm = self._open()
        return self._all(
            [lambda i=i: llm.chat(conversations[i], params[i], **fields) for i in range(len(conversations))],  # type: ignore[misc]
            use_tqdm,
        )

    def describe(self) -> str:
        """What was loaded, in a line."""
        return self._open().describe()

    def close(self) -> None:
        """End what runs and give the memory back. Closing twice is no error."""
        if self._llm is not None:
            self._wait(self._llm.close())
            self._llm = None
            self._stop_loop()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> AsyncLLM:
        if self._llm is None:
            raise RuntimeError("This LLM is closed.")
        return self._llm

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # an interrupt here must end the work there
            raise

    def _all(
        self, streams: Sequence[Callable[[], AsyncGenerator[RequestOutput, None]]], shows_progress: bool
    ) -> list[RequestOutput]:
        return self._wait(_gather(streams, 2 * self._open().max_num_seqs, shows_progress and sys.stderr.isatty()))

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _gather(
    streams: Sequence[Callable[[], AsyncGenerator[RequestOutput, None]]], max_running: int, shows_progress: bool
) -> list[RequestOutput]:
    """The last output of each stream. Of many prompts only so many are prepared ahead of the engine."""
    places = asyncio.Semaphore(max_running)
    num_done = 0

    async def one(stream: Callable[[], AsyncGenerator[RequestOutput, None]]) -> RequestOutput:
        nonlocal num_done
        async with places:
            last: RequestOutput | None = None
            async for output in stream():
                last = output
        assert last is not None, "a generation ended without Finished"
        num_done += 1
        if shows_progress:
            print(f"\r{num_done} of {len(streams)} prompts", end="", file=sys.stderr, flush=True)
        return last

    tasks = [asyncio.create_task(one(stream)) for stream in streams]
    try:
        await asyncio.gather(*tasks)  # the first error is raised as it is, and ends the others
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if shows_progress:
        print(file=sys.stderr)
    return [task.result() for task in tasks]


def _many(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str | Mapping) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _prompt(item: Prompt) -> str | Sequence[int]:
    if isinstance(item, Mapping):
        found: str | Sequence[int] | None = item.get("prompt_token_ids") or item.get("prompt")
        if found is None:
            raise ValueError("A prompt is a text, token ids, or a mapping with `prompt` or `prompt_token_ids`.")
        return found
    return item


def _params(given: SamplingParams | Sequence[SamplingParams] | None, number: int) -> list[SamplingParams]:
    if given is None or isinstance(given, SamplingParams):
        return [given or SamplingParams()] * number
    if len(given) != number:
        raise ValueError(f"There are {number} prompts and {len(given)} sets of sampling parameters.")
    return list(given)
