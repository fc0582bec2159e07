"""Output events → Anthropic's content blocks, as a stream of events or as one message, by one state machine.

message_start ping  ( content_block_start content_block_delta* content_block_stop )*  message_delta message_stop
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass, field
from typing import Any

import orjson

from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.identity import call_id
from vllm_mlx.api.sse import keep_alive
from vllm_mlx.generation.events import Accepted, Finished, GenerationUsage, KeepAlive, OutputEvent
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted

PING = b'event: ping\ndata: {"type":"ping"}\n\n'


def sign(thinking: str) -> str:
    """Clients insist on a signature and send it back. It certifies nothing here; it is a checksum."""
    return base64.b64encode(hashlib.sha256(b"vllm-mlx:" + thinking.encode()).digest()).decode()


def stop_reason(finished: Finished) -> str:
    if finished.reason == "stop" and finished.stop_sequence is not None:
        return "stop_sequence"
    if finished.is_cut:
        return "max_tokens"
    return {"length": "max_tokens", "tool_calls": "tool_use"}.get(finished.reason, "end_turn")


def usage_of(usage: GenerationUsage, *, block_size: int | None) -> dict[str, int]:
    """Prompt tokens in three parts that add up: read from the cache, newly kept for reuse (whole blocks), and the rest.

    `block_size` is None without a prefix cache: nothing is kept then.
    """
    prompt, cached = usage.num_prompt_tokens, usage.num_cached_tokens
    created = max(0, prompt - prompt % block_size - cached) if block_size else 0
    # The prompt's last token is computed with the answer. Clients take a part of 0 tokens for one that was not told.
    created -= created > 0 and cached + created == prompt
    return {
        "input_tokens": prompt - cached - created,
        "cache_creation_input_tokens": created,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.num_completion_tokens,
    }


def event(kind: str, **fields: Any) -> bytes:
    return b"event: " + kind.encode() + b"\ndata: " + orjson.dumps({"type": kind, **fields}) + b"\n\n"


@dataclass
class Block:
    """A content block that is being written."""

    index: int
    kind: str
    pieces: list[str] = field(default_factory=list)
    id: str = ""
    name: str = ""

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def opening(self) -> dict[str, Any]:
        match self.kind:
            case "thinking":
                return {"type": "thinking", "thinking": "", "signature": ""}
            case "tool_use":
                return {"type": "tool_use", "id": self.id, "name": self.name, "input": {}}
        return {"type": "text", "text": ""}

    def whole(self) -> dict[str, Any]:
        match self.kind:
            case "thinking":
                return {"type": "thinking", "thinking": self.text, "signature": sign(self.text)}
            case "tool_use":
                return {"type": "tool_use", "id": self.id, "name": self.name, "input": _parsed(self.text)}
        return {"type": "text", "text": self.text}


def _parsed(arguments: str) -> Any:
    try:
        return orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        # A call cut short by max_tokens: what there is of it, under a name no schema has.
        return {"__incomplete__": arguments}


class MessageRenderer:
    """Bytes of a streamed message, or with `message` the whole one. One per HTTP request; implements `sse.Renderer`."""

    def __init__(
        self, *, id: str, model: str, request_id: str | None, block_size: int | None, diagnostics_level: str | None
    ) -> None:
        self._id = id
        self._model = model
        self._request_id = request_id
        self._block_size = block_size
        self._diagnostics_level = diagnostics_level
        self._blocks: list[Block] = []
        self._open: Block | None = None
        # White space that may be nothing but the gap before a tool call; clients cannot send blank text back.
        self._held = ""
        self._finished: Finished | None = None

    def render(self, index: int, event_: OutputEvent) -> bytes:
        match event_:
            case TextDelta():
                return self._text(event_.text)
            case ReasoningDelta():
                return self._piece("thinking", event_.text, {"type": "thinking_delta", "thinking": event_.text})
            case ToolCallStarted():
                self._held = ""
                id = event_.id or call_id("toolu_", self._id, index, event_.index)
                return self._close() + self._start("tool_use", id=id, name=event_.name)
            case ToolCallDelta():
                delta = {"type": "input_json_delta", "partial_json": event_.arguments}
                return self._piece("tool_use", event_.arguments, delta)
            case ToolCallEnded():
                return self._close()
            case Accepted():
                return self._message_start(event_) + PING
            case KeepAlive():
                return keep_alive(event_) + PING
            case Finished():
                return self._finish(event_)
        return b""

    def failed(self, answer: ErrorAnswer) -> bytes:
        return b"event: error\ndata: " + orjson.dumps(answer.anthropic(self._request_id)) + b"\n\n"

    def message(self) -> dict[str, Any]:
        """The whole answer, after its last event."""
        final = self._finished
        assert final is not None, "a generation ended without Finished"
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [block.whole() for block in self._blocks],
            "stop_reason": stop_reason(final),
            "stop_sequence": final.stop_sequence if stop_reason(final) == "stop_sequence" else None,
            "usage": usage_of(final.usage, block_size=self._block_size),
            **self._extras(final),
        }

    def _message_start(self, accepted: Accepted) -> bytes:
        # What the cache gives is known only later; the last event's usage has the parts.
        usage = usage_of(GenerationUsage(accepted.num_prompt_tokens, 0), block_size=None)
        message: dict[str, Any] = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        return event("message_start", message=message)

    def _text(self, text: str) -> bytes:
        if self._open is None or self._open.kind != "text":
            text, self._held = self._held + text, ""
            if text.isspace() or not text:
                self._held = text
                return b""
        return self._piece("text", text, {"type": "text_delta", "text": text})

    def _piece(self, kind: str, text: str, delta: dict[str, str]) -> bytes:
        out = b""
        if self._open is None or self._open.kind != kind:
            out = self._close() + self._start(kind)
        assert self._open is not None
        self._open.pieces.append(text)
        return out + event("content_block_delta", index=self._open.index, delta=delta)

    def _start(self, kind: str, *, id: str = "", name: str = "") -> bytes:
        self._open = Block(len(self._blocks), kind, id=id, name=name)
        self._blocks.append(self._open)
        return event("content_block_start", index=self._open.index, content_block=self._open.opening())

    def _close(self) -> bytes:
        block, self._open = self._open, None
        if block is None:
            return b""
        out = b""
        if block.kind == "thinking":
            delta = {"type": "signature_delta", "signature": sign(block.text)}
            out = event("content_block_delta", index=block.index, delta=delta)
        return out + event("content_block_stop", index=block.index)

    def _finish(self, final: Finished) -> bytes:
        self._finished = final
        out = self._close()
        delta = {
            "stop_reason": stop_reason(final),
            "stop_sequence": final.stop_sequence if stop_reason(final) == "stop_sequence" else None,
        }
        usage = usage_of(final.usage, block_size=self._block_size)
        return out + event("message_delta", delta=delta, usage=usage, **self._extras(final)) + event("message_stop")

    def _extras(self, final: Finished) -> dict[str, Any]:
        """This server's additions: why a guard ended the answer, and diagnostics where asked for."""
        extras: dict[str, Any] = {}
        if final.reason == "repetition":
            extras["stop_details"] = {"type": "repetition_detected", "detail": final.detail}
        if self._diagnostics_level is not None:
            shown = {"level": self._diagnostics_level, **final.diagnostics}
            if self._diagnostics_level == "basic":
                shown.pop("runtime", None)
            extras["diagnostics"] = shown
        return extras
