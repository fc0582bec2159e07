"""What comes back, in vLLM's shape: one `RequestOutput` a prompt, with a `CompletionOutput` for each of its `n`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.generation.events import (
    Accepted,
    Finished,
    LogprobEntry,
    LogprobsDelta,
    OutputEvent,
)
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStarted


@dataclass(slots=True)
class ToolCallOutput:
    """`arguments` is a JSON object as text."""

    name: str
    arguments: str = ""


@dataclass(slots=True)
class CompletionOutput:
    """One answer. `finish_reason`: stop, length, tool_calls, repetition, cancelled, deadline or error.

    `token_ids` and `logprobs` are filled when `SamplingParams.logprobs` was set. `stop_reason` is the stop string.
    """

    index: int
    text: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCallOutput] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[LogprobEntry] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: str | None = None
    num_tokens: int = 0
    error: str | None = None

    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """A prompt and what was made of it so far; `finished` when all its answers are."""

    request_id: str
    prompt: str | None
    outputs: list[CompletionOutput]
    prompt_token_ids: list[int] = field(default_factory=list)
    prompt_logprobs: list[LogprobEntry] | None = None
    num_cached_tokens: int | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return all(output.finished() for output in self.outputs)

    def take(self, index: int, event: OutputEvent) -> bool:
        """Fold an event of answer `index` in; False if it changed nothing a reader would see."""
        output = self.outputs[index]
        match event:
            case Accepted():
                self.prompt_token_ids = list(event.prompt_token_ids)
                return False
            case TextDelta():
                output.text += event.text
            case ReasoningDelta():
                output.reasoning += event.text
            case ToolCallStarted():
                output.tool_calls.append(ToolCallOutput(event.name))
            case ToolCallDelta():
                output.tool_calls[event.index].arguments += event.arguments
            case LogprobsDelta(is_prompt=True):
                self.prompt_logprobs = [*(self.prompt_logprobs or ()), *event.entries]
                return False
            case LogprobsDelta():
                output.logprobs = [*(output.logprobs or ()), *event.entries]
                output.token_ids.extend(entry.token_id for entry in event.entries)
                total = sum(entry.logprob for entry in event.entries)
                output.cumulative_logprob = (output.cumulative_logprob or 0.0) + total
                return False
            case Finished():
                output.finish_reason = event.reason
                output.stop_reason = event.stop_sequence
                output.num_tokens = event.usage.num_completion_tokens
                output.error = event.error
                self.num_cached_tokens = event.usage.num_cached_tokens
                self.diagnostics = event.diagnostics
            case _:
                return False
        return True
