"""Chat with tools that the server itself calls: generate, call, tell the model, generate on. Event loop.

Stands in front of a generation service and looks like one, so every protocol has it. The reader sees one answer: the
texts of all steps, none of the calls made here. A step that calls a tool of the client's ends the answer, as it would
without us; calls of ours in the same step are then not made, because the model could not be told of them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

from vllm_mlx.errors import VllmMlxError
from vllm_mlx.generation.events import Accepted, Finished, GenerationUsage, KeepAlive, OutputEvent
from vllm_mlx.generation.request import ChatMessage, GenerationRequest, TextPart, Tool, ToolCall, ToolChoice
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted

log = logging.getLogger(__name__)

KEEP_ALIVE_S = 5.0


class Generates(Protocol):
    """A generation service."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[OutputEvent]: ...
    def cancel(self, request_id: str) -> bool: ...
    async def count_prompt_tokens(self, request: GenerationRequest) -> int: ...
    async def tokenize_prompt(
        self, request: GenerationRequest, *, add_special_tokens: bool = True
    ) -> tuple[int, ...]: ...
    async def detokenize(self, token_ids: tuple[int, ...]) -> str: ...
    def token_text(self, token_id: int) -> str: ...


class NamedTool(Protocol):
    @property
    def full_name(self) -> str: ...
    @property
    def description(self) -> str: ...
    @property
    def parameters(self) -> Mapping[str, Any]: ...


class Result(Protocol):
    @property
    def text(self) -> str: ...
    @property
    def is_error(self) -> bool: ...


class Tools(Protocol):
    """`mcp_client.toolbox.Toolbox` fits."""

    def tools(self) -> Sequence[NamedTool]: ...
    async def call(self, full_name: str, arguments: Mapping[str, Any]) -> Result: ...


@dataclass
class Call:
    """A call of ours as the model makes it."""

    name: str
    arguments: str = ""
    is_complete: bool = True
    id: str = field(default_factory=lambda: uuid.uuid4().hex[:9])  # nine letters: what the strictest templates take


@dataclass
class Step:
    """What one generation of the loop said."""

    text: str = ""
    reasoning: str = ""
    ours: dict[int, Call] = field(default_factory=dict)
    num_others: int = 0
    finished: Finished | None = None


class ToolLoop:
    """`max_steps`: generations of one answer that may end in calls; after them the model answers without tools."""

    def __init__(self, service: Generates, toolbox: Tools, *, max_steps: int, timeout_s: float) -> None:
        self._service = service
        self._toolbox = toolbox
        self._max_steps = max_steps
        self._timeout_s = timeout_s
        self._calling: dict[str, asyncio.Event] = {}  # request id → set when it is cancelled

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Of the first prompt, with our tools in it; what later steps add is not known before."""
        return await self._service.count_prompt_tokens(self._with_ours(request))

    async def tokenize_prompt(self, request: GenerationRequest, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        return await self._service.tokenize_prompt(request, add_special_tokens=add_special_tokens)

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        return await self._service.detokenize(token_ids)

    def token_text(self, token_id: int) -> str:
        return self._service.token_text(token_id)

    def cancel(self, request_id: str) -> bool:
        if (cancelled := self._calling.get(request_id)) is not None:
            cancelled.set()
            self._service.cancel(request_id)
            return True
        return self._service.cancel(request_id)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputEvent, None]:
        """The events of one answer, of as many generations as it takes."""
        ours = self._offered(request)
        if not ours:
            async with aclosing(cast("AsyncGenerator[OutputEvent, None]", self._service.generate(request))) as events:
                async for event in events:
                    yield event
            return
        deadline = time.monotonic() + min(request.timeout_s or self._timeout_s, self._timeout_s)
        usage = GenerationUsage(0, 0)
        made: list[dict[str, Any]] = []
        has_text = False
        request = self._with_ours(request)
        names = _names(ours, {tool.name for tool in request.tools} - {tool.name for tool in ours})
        cancelled = self._calling[request.id] = asyncio.Event()
        try:
            for number in range(self._max_steps + 1):
                if number == self._max_steps:
                    request = replace(request, tool_choice=ToolChoice("none"))
                step = Step()
                async with aclosing(self._read(request, step, names)) as events:
                    async for event in events:
                        if number and isinstance(event, Accepted):
                            continue
                        if isinstance(event, TextDelta):
                            if number and has_text and not step.text.strip():
                                yield TextDelta("\n\n")
                            has_text = has_text or bool(event.text.strip())
                            step.text += event.text
                        yield event
                finished = step.finished
                assert finished is not None, "a generation without an end"
                usage = add(usage, finished.usage)
                left = None if request.max_tokens is None else request.max_tokens - finished.usage.num_completion_tokens
                goes_on = finished.reason == "tool_calls" and step.ours and not step.num_others
                if not goes_on or (left is not None and left <= 0):
                    yield _last(replace(finished, reason="length") if goes_on else finished, usage, made, step)
                    return
                answers: list[ChatMessage] = []
                calling = self._call_all(list(step.ours.values()), answers, made, deadline, cancelled)
                async with aclosing(calling):
                    async for event in calling:
                        yield event
                if cancelled.is_set() or time.monotonic() >= deadline:
                    reason = "cancelled" if cancelled.is_set() else "deadline"
                    yield _last(replace(finished, reason=reason), usage, made, step)
                    return
                request = _told(request, step, answers, left, deadline)
        finally:
            self._calling.pop(request.id, None)

    def _with_ours(self, request: GenerationRequest) -> GenerationRequest:
        return replace(request, tools=(*request.tools, *self._offered(request)))

    def _offered(self, request: GenerationRequest) -> tuple[Tool, ...]:
        """Our tools, for a chat that leaves the choice open; the client's own come first and keep their names."""
        if not request.messages or request.tool_choice.mode != "auto" or request.continue_final_message:
            return ()
        taken = {tool.name for tool in request.tools}
        return tuple(
            Tool(tool.full_name, tool.description, tool.parameters)
            for tool in self._toolbox.tools()
            if tool.full_name not in taken
        )

    async def _read(
        self, request: GenerationRequest, step: Step, ours: Mapping[str, str]
    ) -> AsyncGenerator[OutputEvent, None]:
        """A generation's events without our calls and without the end, which are noted in `step`."""
        numbers: dict[int, int] = {}  # the client's calls, counted anew
        async with aclosing(cast("AsyncGenerator[OutputEvent, None]", self._service.generate(request))) as events:
            async for event in events:
                match event:
                    case ToolCallStarted() if event.name in ours:
                        step.ours[event.index] = Call(ours[event.name])
                    case ToolCallDelta() if event.index in step.ours:
                        step.ours[event.index].arguments += event.arguments
                    case ToolCallEnded() if event.index in step.ours:
                        step.ours[event.index].is_complete = event.is_complete
                    case ToolCallStarted():
                        numbers[event.index] = step.num_others
                        step.num_others += 1
                        yield replace(event, index=numbers[event.index])
                    case ToolCallDelta() | ToolCallEnded():
                        yield replace(event, index=numbers[event.index])
                    case Finished():
                        step.finished = event
                    case ReasoningDelta():
                        step.reasoning += event.text
                        yield event
                    case _:
                        yield event

    async def _call_all(
        self,
        calls: Sequence[Call],
        answers: list[ChatMessage],
        made: list[dict[str, Any]],
        deadline: float,
        cancelled: asyncio.Event,
    ) -> AsyncGenerator[OutputEvent, None]:
        """Make the calls together; signs of life meanwhile. What came of them goes into `answers`, in their order."""
        tasks = [asyncio.create_task(self._call(call, made)) for call in calls]
        stop = asyncio.create_task(cancelled.wait())
        try:
            while pending := {task for task in tasks if not task.done()}:
                wait_s = min(KEEP_ALIVE_S, deadline - time.monotonic())
                if stop.done() or wait_s <= 0:
                    return
                done, _ = await asyncio.wait({*pending, stop}, timeout=wait_s, return_when=asyncio.FIRST_COMPLETED)
                if not done:
                    yield KeepAlive("tool")
            for call, task in zip(calls, tasks, strict=True):
                answers.append(
                    ChatMessage("tool", (TextPart(task.result()),), tool_call_id=call.id, name=call.name)
                )
        finally:
            for task in tasks:
                task.cancel()
            stop.cancel()

    async def _call(self, call: Call, made: list[dict[str, Any]]) -> str:
        """What the model is told of a call: the result, or why there is none."""
        started, is_error = time.monotonic(), True
        try:
            arguments = json.loads(call.arguments or "{}")
            if not call.is_complete or not isinstance(arguments, dict):
                return "Error: the arguments are not a whole JSON object; call the tool again."
            result = await self._toolbox.call(call.name, arguments)
            is_error = result.is_error
            return f"Error: {result.text}" if is_error else result.text
        except ValueError:
            return "Error: the arguments are not valid JSON; call the tool again."
        except VllmMlxError as error:
            return f"Error: {error}"
        finally:
            seconds = round(time.monotonic() - started, 3)
            made.append({"tool": call.name, "is_error": is_error, "seconds": seconds})
            log.info("called %s in %.3f s%s", call.name, seconds, ", which failed" if is_error else "")


def _names(ours: Sequence[Tool], taken: set[str]) -> dict[str, str]:
    """What the model may call our tools → their names: the name, and its last part where only one tool has it, since
    small models leave the server's name out."""
    short: dict[str, list[str]] = {}
    for tool in ours:
        short.setdefault(tool.name.partition("__")[2], []).append(tool.name)
    alone = {last: names[0] for last, names in short.items() if len(names) == 1 and last not in taken}
    return alone | {tool.name: tool.name for tool in ours}


def _told(
    request: GenerationRequest, step: Step, answers: Sequence[ChatMessage], left: int | None, deadline: float
) -> GenerationRequest:
    """The request with the step's turn and the tools' answers behind it, and what is left of its limits."""
    calls = tuple(ToolCall(call.id, call.name, call.arguments or "{}") for call in step.ours.values())
    text = step.text.strip()
    turn = ChatMessage(
        "assistant", (TextPart(text),) if text else (), reasoning=step.reasoning or None, tool_calls=calls
    )
    return replace(
        request,
        messages=(*request.messages, turn, *answers),
        max_tokens=left,
        timeout_s=max(0.001, deadline - time.monotonic()),
    )


def add(a: GenerationUsage, b: GenerationUsage) -> GenerationUsage:
    return GenerationUsage(
        a.num_prompt_tokens + b.num_prompt_tokens,
        a.num_completion_tokens + b.num_completion_tokens,
        a.num_cached_tokens + b.num_cached_tokens,
        a.num_reasoning_tokens + b.num_reasoning_tokens,
    )


def _last(
    finished: Finished, usage: GenerationUsage, made: Sequence[Mapping[str, Any]], step: Step
) -> Finished:
    """The answer's end: the last step's, with the numbers of all. Calls of ours are no reason to end."""
    reason = "stop" if finished.reason == "tool_calls" and not step.num_others else finished.reason
    diagnostics = {**finished.diagnostics, "mcp": {"calls": list(made)}} if made else finished.diagnostics
    return replace(finished, reason=reason, usage=usage, diagnostics=diagnostics)
