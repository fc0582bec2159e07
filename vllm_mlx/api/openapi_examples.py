"""What the OpenAPI document shows of each operation: a request that works, and what is always in its answer.

A test sends these requests and compares the answers, so they cannot become untrue unnoticed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EVENTS = "text/event-stream"
JSON = "application/json"
_MESSAGE = [{"role": "user", "content": "Reply with pong"}]
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 2,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}
_CHAT_CHOICE = {
    "index": 0,
    "message": {"role": "assistant", "content": "pong", "refusal": None},
    "logprobs": None,
    "finish_reason": "stop",
    "stop_reason": None,
}
_TEXT_CHOICE = {"index": 0, "text": " three", "logprobs": None, "finish_reason": "length", "stop_reason": None}
_OUTPUT = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [{"type": "output_text", "text": "pong", "annotations": [], "logprobs": []}],
}
_RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1795676120,
    "status": "completed",
    "model": "demo",
    "output": [_OUTPUT],
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 2,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 14,
    },
}
_MODEL = {"id": "demo", "object": "model", "created": 1795676120, "owned_by": "vllm-mlx", "max_model_len": 8192}
_WHOLE = {"id": "chatcmpl-1", "object": "chat.completion", "created": 1795676120, "model": "demo"}


@dataclass(frozen=True, slots=True)
class Shown:
    """`answer`: JSON whose top-level fields are always there. `media`: other types the answer may have."""

    request: dict[str, Any] | None = None
    answer: dict[str, Any] | None = None
    media: tuple[str, ...] = ()
    extra_statuses: tuple[str, ...] = ()
    schema: dict[str, Any] = field(default_factory=dict)

    def content(self) -> dict[str, Any]:
        """The `content` of the answer with status 200."""
        found: dict[str, Any] = {}
        if self.answer is not None:
            schema = {"type": "object", "required": list(self.answer), **self.schema}
            found[JSON] = {"schema": schema, "example": self.answer}
        # Each event of a stream is JSON of its own; OpenAPI 3.1 has no word for it, so nothing is said of the whole.
        return {**found, **{media: {"schema": {} if media == EVENTS else {"type": "string"}} for media in self.media}}


_LIST = {"object": "list", "data": []}
SHOWN: dict[str, Shown] = {
    "post /v1/chat/completions": Shown(
        {"model": "default", "messages": _MESSAGE, "max_tokens": 32},
        {**_WHOLE, "system_fingerprint": "fp", "choices": [_CHAT_CHOICE], "usage": _USAGE},
        (EVENTS,),
    ),
    "post /v1/completions": Shown(
        {"model": "default", "prompt": "One, two,", "max_tokens": 8},
        {**_WHOLE, "id": "cmpl-1", "object": "text_completion", "choices": [_TEXT_CHOICE], "usage": _USAGE},
        (EVENTS,),
    ),
    "post /v1/responses": Shown(
        {"model": "default", "input": "Reply with pong", "max_output_tokens": 32}, _RESPONSE, (EVENTS,)
    ),
    "post /v1/responses/input_tokens": Shown(
        {"model": "default", "input": "Reply with pong"}, {"object": "response.input_tokens", "input_tokens": 12}
    ),
    "get /v1/responses/{response_id}": Shown(None, _RESPONSE),
    "delete /v1/responses/{response_id}": Shown(None, {"id": "resp_1", "object": "response", "deleted": True}),
    "post /v1/responses/{response_id}/cancel": Shown(None, {**_RESPONSE, "status": "cancelled"}),
    "get /v1/responses/{response_id}/input_items": Shown(
        None, {**_LIST, "first_id": None, "last_id": None, "has_more": False}
    ),
    "post /v1/messages": Shown(
        {"model": "default", "max_tokens": 32, "messages": _MESSAGE},
        {
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": "demo",
            "content": [{"type": "text", "text": "pong"}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {
                "input_tokens": 12,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 2,
            },
        },
        (EVENTS,),
    ),
    "post /v1/messages/count_tokens": Shown({"model": "default", "messages": _MESSAGE}, {"input_tokens": 12}),
    "get /v1/models": Shown(None, {**_LIST, "data": [_MODEL]}, schema={"required": ["data"]}),
    "get /v1/models/{model_id}": Shown(None, _MODEL, schema={"required": ["id"]}),
    "post /tokenize": Shown(
        {"model": "default", "prompt": "Hello"},
        {"count": 1, "max_model_len": 8192, "tokens": [9707], "token_strs": None},
    ),
    "post /detokenize": Shown({"model": "default", "tokens": [72, 105]}, {"prompt": "Hi"}),
    "get /v1/requests": Shown(None, _LIST),
    "post /v1/requests/{request_id}/cancel": Shown(
        None, {"id": "chatcmpl-1", "request_id": "req_1", "object": "request", "cancelled": True}
    ),
    "get /v1/status": Shown(None, {"status": "running", "model": "demo", "num_running": 0, "num_waiting": 0}),
    "get /v1/cache/stats": Shown(None, {"object": "cache.stats", "prefix_cache_bytes": 0, "num_hits": 0}),
    "delete /v1/cache": Shown(None, {"object": "cache.cleared", "status": "ok", "freed_bytes": 0}),
    "get /v1/capabilities": Shown(None, {"object": "capabilities", "version": "0.1.0", "model_loaded": True}),
    "get /health": Shown(None, {"status": "healthy", "model_loaded": True, "version": "0.1.0"}),
    "get /health/ready": Shown(None, {"status": "healthy"}),
    "get /health/live": Shown(None, {"status": "healthy"}),
    "get /health/diagnostics": Shown(None, {"status": "healthy", "checks": {}}),
    "get /metrics": Shown(media=("text/plain",)),
    "get /v1/dashboard": Shown(media=(EVENTS,)),
    "post /v1/embeddings": Shown({"input": "Hello"}, {**_LIST, "model": "minilm", "usage": {"prompt_tokens": 3}}),
    "post /v1/rerank": Shown({"query": "sea", "documents": ["waves", "hills"]}, {"results": []}),
    "post /v2/rerank": Shown({"query": "sea", "documents": ["waves", "hills"]}, {"results": []}),
    "post /v1/score": Shown({"text_1": "sea", "text_2": "waves"}, {**_LIST}),
    "post /v1/audio/transcriptions": Shown(None, {"text": "Hello."}, (EVENTS, "text/plain", "application/x-subrip")),
    "post /v1/audio/translations": Shown(None, {"text": "Hello."}, (EVENTS, "text/plain", "application/x-subrip")),
    "post /v1/audio/speech": Shown(
        {"input": "Hello.", "voice": "default"},
        media=("audio/wav", "audio/mpeg", "audio/opus", "audio/ogg", "audio/flac", "audio/pcm", EVENTS),
    ),
    "get /v1/audio/voices": Shown(None, {"object": "list", "data": []}, schema={"required": []}),
    "post /v1/models/{model_id}/load": Shown(None, {"id": "demo"}, extra_statuses=("409",)),
    "post /v1/models/{model_id}/unload": Shown(None, {"id": "demo"}, extra_statuses=("409",)),
    "get /v1/mcp/tools": Shown(None, {"tools": [], "count": 0}),
    "get /v1/mcp/servers": Shown(None, {"servers": []}),
    "post /v1/load_lora_adapter": Shown({"lora_name": "poet", "lora_path": "/adapters/poet"}, media=("text/plain",)),
    "post /v1/unload_lora_adapter": Shown({"lora_name": "poet"}, media=("text/plain",)),
}
