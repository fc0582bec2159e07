"""Output events → OpenAI's words: finish reasons, usage, log-probabilities, and the bytes of streamed chat chunks.

A chunk is bytes made once per stream around an orjson-encoded delta, because it is written for every token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isnan, nan
from typing import Any

import orjson

from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.identity import call_id
from vllm_mlx.api.sse import DONE, keep_alive
from vllm_mlx.generation.events import (
    Finished,
    KeepAlive,
    LogprobEntry,
    LogprobsDelta,
    Message,
    OutputEvent,
)
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStarted

dumps = orjson.dumps


def finish_reason(finished: Finished) -> str:
    """OpenAI knows stop, length and tool_calls; what else ended an answer is told by `stop_reason`.

    `length` is what clients take for "not whole": the official package refuses to parse such an answer.
    """
    if finished.is_cut:
        return "length"
    return finished.reason if finished.reason in ("stop", "length", "tool_calls") else "stop"


def stop_fields(finished: Finished) -> dict[str, Any]:
    """vLLM's `stop_reason` (the stop string that matched), extended by why a guard or a client ended the answer."""
    match finished.reason:
        case "repetition":
            return {"stop_reason": "repetition_detected", "stop_reason_detail": finished.detail}
        case "cancelled":
            return {"stop_reason": "cancelled", "stop_reason_detail": finished.detail}
        case _:
            return {"stop_reason": finished.stop_sequence}


def usage_of(finals: Sequence[Finished], *, choices_per_prompt: int = 1) -> dict[str, Any]:
    """Usage of one HTTP request: a prompt counts once, however many choices share it."""
    firsts = [final.usage for final in finals[::choices_per_prompt]]
    prompt = sum(usage.num_prompt_tokens for usage in firsts)
    cached = sum(usage.num_cached_tokens for usage in firsts)
    completion = sum(final.usage.num_completion_tokens for final in finals)
    reasoning = sum(final.usage.num_reasoning_tokens for final in finals)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
        "completion_tokens_details": {"reasoning_tokens": reasoning},
    }


def diagnostics_of(finals: Sequence[Finished], level: str | None) -> dict[str, Any] | None:
    """What `include_diagnostics` shows: the first choice's; `basic` leaves the server's inner state out."""
    if level is None:
        return None
    shown = {"level": level, **finals[0].diagnostics}
    if level == "basic":
        shown.pop("runtime", None)
    return shown


def chat_logprobs(entries: Iterable[LogprobEntry]) -> dict[str, Any]:
    return {
        "content": [
            {
                "token": entry.token,
                "logprob": entry.logprob,
                "bytes": list(entry.token_bytes),
                "top_logprobs": [
                    {"token": token, "logprob": logprob, "bytes": list(token_bytes)}
                    for token, token_bytes, logprob, _ in entry.top
                ],
            }
            for entry in entries
        ],
        "refusal": None,
    }


def legacy_logprobs(entries: Sequence[LogprobEntry], *, text_offset: int) -> dict[str, Any]:
    """The shape of /v1/completions; `text_offset` is where the first entry's text begins."""
    offsets = []
    for entry in entries:
        offsets.append(text_offset)
        text_offset += len(entry.token)
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [None if isnan(entry.logprob) else entry.logprob for entry in entries],
        "top_logprobs": [_by_text(entry) for entry in entries],
        "text_offset": offsets,
    }


def _by_text(entry: LogprobEntry) -> dict[str, float] | None:
    """Text → logprob, the likeliest first; of two tokens with one text, the likelier."""
    if isnan(entry.logprob):
        return None
    found: dict[str, float] = {}
    for token, _, logprob, _ in entry.top:
        found.setdefault(token, logprob)
    found.setdefault(entry.token, entry.logprob)
    return found


def unscored(token: str, token_id: int) -> LogprobEntry:
    """The prompt's first token, which nothing precedes: it has no log-probability."""
    return LogprobEntry(token, token.encode(), token_id, nan)


def prompt_logprobs(entries: Sequence[LogprobEntry]) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token a map of token id → logprob, rank and text; null for the first token."""
    return [None, *({str(i): item for i, item in _ranked(entry)} for entry in entries)]


def _ranked(entry: LogprobEntry) -> Iterator[tuple[int, dict[str, Any]]]:
    ranks = {token_id: rank for rank, (_, _, _, token_id) in enumerate(entry.top, 1)}
    own = {"logprob": entry.logprob, "rank": ranks.get(entry.token_id), "decoded_token": entry.token}
    yield entry.token_id, own
    for token, _, logprob, token_id in entry.top:
        if token_id != entry.token_id:
            yield token_id, {"logprob": logprob, "rank": ranks[token_id], "decoded_token": token}


def chat_message(message: Message, *, answer_id: str, index: int) -> dict[str, Any]:
    """Choice `index`'s assistant message; absent things are absent, except `content`, which clients expect to find."""
    rendered: dict[str, Any] = {"role": "assistant", "content": message.text or None, "refusal": None}
    if message.reasoning:
        rendered["reasoning_content"] = rendered["reasoning"] = message.reasoning
    if message.tool_calls:
        rendered["tool_calls"] = [
            {
                "id": call.id or call_id("call_", answer_id, index, number),
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments or "{}"},
            }
            for number, call in enumerate(message.tool_calls)
        ]
    elif not message.reasoning:
        rendered["content"] = message.text
    return rendered


def final_of(message: Message) -> Finished:
    """A stream that ended without its final event is a defect of ours, not an answer."""
    assert message.finished is not None, "a generation ended without Finished"
    return message.finished


class ChatRenderer:
    """Bytes of a streamed chat completion. One per HTTP request; implements `sse.Renderer`."""

    def __init__(
        self,
        *,
        id: str,
        model: str,
        fingerprint: str,
        created: int,
        num_choices: int,
        include_usage: bool,
        diagnostics_level: str | None,
    ) -> None:
        head = {
            "id": id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": model,
            "system_fingerprint": fingerprint,
        }
        self._id = id
        self._head = b"data: " + dumps(head)[:-1]
        # While a usage chunk is still to come, every other one says that it has none.
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._prefixes = [self._head + b',"choices":[{"index":%d,"delta":' % i for i in range(num_choices)]
        self._middle = b',"logprobs":null,"finish_reason":null}]' + self._tail
        self._num_choices = num_choices
        self._include_usage = include_usage
        self._diagnostics_level = diagnostics_level
        self._has_role = [False] * num_choices
        self._logprobs: list[list[LogprobEntry]] = [[] for _ in range(num_choices)]
        self._finals: dict[int, Finished] = {}

    def render(self, index: int, event: OutputEvent) -> bytes:
        kind = type(event)
        if kind is TextDelta:
            return self._delta(index, b'{"content":' + dumps(event.text) + b"}")  # type: ignore[union-attr]
        if kind is ReasoningDelta:
            text = dumps(event.text)  # type: ignore[union-attr]
            return self._delta(index, b'{"reasoning_content":' + text + b',"reasoning":' + text + b"}")
        match event:
            case ToolCallStarted():
                function = {"name": event.name, "arguments": ""}
                call = {
                    "index": event.index,
                    "id": event.id or call_id("call_", self._id, index, event.index),
                    "type": "function",
                    "function": function,
                }
                return self._delta(index, dumps({"tool_calls": [call]}))
            case ToolCallDelta():
                call = {"index": event.index, "function": {"arguments": event.arguments}}
                return self._delta(index, dumps({"tool_calls": [call]}))
            case LogprobsDelta(is_prompt=False):
                self._logprobs[index].extend(event.entries)
            case KeepAlive():
                return keep_alive(event)
            case Finished():
                return self._finish(index, event)
        return b""

    def failed(self, answer: ErrorAnswer) -> bytes:
        return b"data: " + dumps(answer.openai()) + b"\n\n" + DONE

    def _delta(self, index: int, delta: bytes) -> bytes:
        role = b"" if self._has_role[index] else self._role(index)
        if not self._logprobs[index]:
            return role + self._prefixes[index] + delta + self._middle
        entries, self._logprobs[index] = self._logprobs[index], []
        logprobs = dumps(chat_logprobs(entries))
        return (
            role + self._prefixes[index] + delta + b',"logprobs":' + logprobs + b',"finish_reason":null}]' + self._tail
        )

    def _role(self, index: int) -> bytes:
        """The first chunk of a choice: sent with the first output, so that the first chunk means the first token."""
        self._has_role[index] = True
        return self._prefixes[index] + b'{"role":"assistant","content":""}' + self._middle

    def _finish(self, index: int, event: Finished) -> bytes:
        self._finals[index] = event
        entries = self._logprobs[index]
        ending: dict[str, Any] = {
            "logprobs": chat_logprobs(entries) if entries else None,
            "finish_reason": finish_reason(event),
            **stop_fields(event),
        }
        out = b"" if self._has_role[index] else self._role(index)
        out += self._prefixes[index] + b"{}," + dumps(ending)[1:] + b"]"
        is_last = len(self._finals) == self._num_choices
        diagnostics = self._diagnostics() if is_last else None
        if diagnostics and not self._include_usage:
            out += b',"diagnostics":' + dumps(diagnostics)
        out += self._tail
        return out + self._end(diagnostics) if is_last else out

    def _end(self, diagnostics: Mapping[str, Any] | None) -> bytes:
        """What follows the last choice's last chunk."""
        if not self._include_usage:
            return DONE
        finals = [self._finals[i] for i in range(self._num_choices)]
        chunk = self._head + b',"choices":[],"usage":' + dumps(usage_of(finals, choices_per_prompt=self._num_choices))
        if diagnostics:
            chunk += b',"diagnostics":' + dumps(diagnostics)
        return chunk + b"}\n\n" + DONE

    def _diagnostics(self) -> dict[str, Any] | None:
        return diagnostics_of([self._finals[i] for i in range(self._num_choices)], self._diagnostics_level)
