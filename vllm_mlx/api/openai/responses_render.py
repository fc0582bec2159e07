"""Output events → items of a response, as a stream of numbered events or as one object, by one state machine.

created in_progress ( output_item.added part.added delta* done part.done output_item.done )* completed|incomplete|failed
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import orjson

from vllm_mlx.api.errors import ErrorAnswer
from vllm_mlx.api.identity import call_id
from vllm_mlx.api.openai.render import diagnostics_of, stop_fields
from vllm_mlx.api.openai.responses_convert import ToolName, seal
from vllm_mlx.api.sse import keep_alive
from vllm_mlx.generation.events import Accepted, Finished, GenerationUsage, KeepAlive, OutputEvent
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "custom_tool_call": "ctc"}
_ERROR_CODES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


def usage_of(usage: GenerationUsage, *, block_size: int | None) -> dict[str, Any]:
    """`block_size` is None without a prefix cache: nothing is kept for reuse then."""
    prompt, cached = usage.num_prompt_tokens, usage.num_cached_tokens
    written = max(0, prompt - prompt % block_size - cached) if block_size else 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": written},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": prompt + usage.num_completion_tokens,
    }


class ResponseRenderer:
    """Bytes of a streamed response; `response` is the whole object. One per HTTP request; implements `sse.Renderer`.

    `head` holds the fields known from the request; `now` dates its completion; `keep` is called once with the final
    object.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        *,
        names: Mapping[str, ToolName],
        seals_reasoning: bool,
        block_size: int | None,
        diagnostics_level: str | None,
        now: Callable[[], int],
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        self.response: dict[str, Any] = {**head, "status": "in_progress", "output": [], "usage": None}
        self._names = names
        self._seals_reasoning = seals_reasoning
        self._block_size = block_size
        self._diagnostics_level = diagnostics_level
        self._now = now
        self._keep = keep
        self._number = 0
        self._item: dict[str, Any] | None = None
        self._pieces: list[str] = []
        # White space that may be nothing but the gap before a tool call.
        self._held = ""

    def render(self, index: int, event: OutputEvent) -> bytes:
        match event:
            case TextDelta():
                return self._text(event.text)
            case ReasoningDelta():
                return self._piece("reasoning", event.text)
            case ToolCallStarted():
                self._held = ""
                return self._close() + self._open_call(event)
            case ToolCallDelta():
                return self._arguments(event.arguments)
            case ToolCallEnded():
                return self._close("completed" if event.is_complete else "incomplete")
            case Accepted():
                return self._event("response.created", response=self.response) + self._event(
                    "response.in_progress", response=self.response
                )
            case KeepAlive():
                return keep_alive(event)
            case Finished():
                return self._finish(event)
        return b""

    def failed(self, answer: ErrorAnswer) -> bytes:
        out = self._close("incomplete")
        error = {"code": _ERROR_CODES.get(answer.status, "server_error"), "message": answer.message}
        self.response.update(status="failed", error=error)
        self._keep(self.response)
        return out + self._event("response.failed", response=self.response)

    def _event(self, kind: str, **fields: Any) -> bytes:
        data = orjson.dumps({"type": kind, "sequence_number": self._number, **fields})
        self._number += 1
        return b"event: " + kind.encode() + b"\ndata: " + data + b"\n\n"

    def _at(self) -> dict[str, Any]:
        assert self._item is not None
        return {"item_id": self._item["id"], "output_index": len(self.response["output"])}

    def _open(self, kind: str, **fields: Any) -> bytes:
        self._pieces = []
        id = call_id(f"{_PREFIXES[kind]}_", self.response["id"], 0, len(self.response["output"]))
        self._item = {"id": id, "type": kind, **fields, "status": "in_progress"}
        return self._event("response.output_item.added", output_index=len(self.response["output"]), item=self._item)

    def _text(self, text: str) -> bytes:
        if self._item is None or self._item["type"] != "message":
            text, self._held = self._held + text, ""
            if text.isspace() or not text:
                self._held = text
                return b""
        return self._piece("message", text)

    def _part(self, text: str) -> dict[str, Any]:
        assert self._item is not None
        if self._item["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _piece(self, kind: str, text: str) -> bytes:
        out = b""
        if self._item is None or self._item["type"] != kind:
            out = self._close()
            out += (
                self._open(kind, summary=[], content=[])
                if kind == "reasoning"
                else self._open(kind, role="assistant", content=[])
            )
            out += self._event("response.content_part.added", **self._at(), content_index=0, part=self._part(""))
        self._pieces.append(text)
        if kind == "reasoning":
            return out + self._event("response.reasoning_text.delta", **self._at(), content_index=0, delta=text)
        return out + self._event("response.output_text.delta", **self._at(), content_index=0, delta=text, logprobs=[])

    def _open_call(self, event: ToolCallStarted) -> bytes:
        name = self._names.get(event.name, ToolName(event.name))
        id = event.id or call_id("call_", self.response["id"], 0, event.index)
        fields: dict[str, Any] = {"call_id": id, "name": name.name}
        if name.namespace is not None:
            fields["namespace"] = name.namespace
        if name.is_custom:
            return self._open("custom_tool_call", **fields, input="")
        return self._open("function_call", **fields, arguments="")

    def _arguments(self, text: str) -> bytes:
        if self._item is None:
            return b""
        self._pieces.append(text)
        if self._item["type"] == "custom_tool_call":
            return b""  # The input is inside of JSON; it is told when it is whole.
        return self._event("response.function_call_arguments.delta", **self._at(), delta=text)

    def _close(self, status: str = "completed") -> bytes:
        if self._item is None:
            return b""
        item, text, at, out = self._item, "".join(self._pieces), self._at(), b""
        item["status"] = status
        match item["type"]:
            case "function_call":
                if not text:
                    out, text = self._arguments("{}"), "{}"
                item["arguments"] = text
                out += self._event("response.function_call_arguments.done", **at, name=item["name"], arguments=text)
            case "custom_tool_call":
                item["input"] = text = _custom_input(text)
                out = self._event("response.custom_tool_call_input.delta", **at, delta=text)
                out += self._event("response.custom_tool_call_input.done", **at, input=text)
            case kind:
                part = self._part(text)
                item["content"] = [part]
                if kind == "reasoning":
                    if self._seals_reasoning:
                        item["encrypted_content"] = seal(text)
                    out = self._event("response.reasoning_text.done", **at, content_index=0, text=text)
                else:
                    out = self._event("response.output_text.done", **at, content_index=0, text=text, logprobs=[])
                out += self._event("response.content_part.done", **at, content_index=0, part=part)
        out += self._event("response.output_item.done", output_index=at["output_index"], item=item)
        self.response["output"].append(item)
        self._item = None
        return out

    def _finish(self, final: Finished) -> bytes:
        status = {"length": "incomplete", "cancelled": "cancelled"}.get(final.reason, "completed")
        status = "incomplete" if final.is_cut and status == "completed" else status
        out = self._close("completed" if status == "completed" else "incomplete")
        if not self.response["output"] and status == "completed":
            out += self._piece("message", self._held) + self._close()
        self.response.update(
            status=status,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            completed_at=self._now() if status == "completed" else None,
            usage=usage_of(final.usage, block_size=self._block_size),
        )
        if final.reason in ("repetition", "cancelled"):
            self.response.update(stop_fields(final))
        if diagnostics := diagnostics_of([final], self._diagnostics_level):
            self.response["diagnostics"] = diagnostics
        self._keep(self.response)
        kind = "response.completed" if status == "completed" else "response.incomplete"
        return out + self._event(kind, response=self.response)


def _custom_input(arguments: str) -> str:
    """The one string of a custom call; of a call that broke off, what there is of it."""
    try:
        found = orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:
        return arguments
    value = found.get("input", "") if isinstance(found, dict) else found
    return value if isinstance(value, str) else orjson.dumps(value).decode()
