"""`vllm-mlx record`: send payloads to a running server and write down all that a report of the run must say.

The server itself says which model, command, interpreter and installation it is; what it does not say is `unknown`, and
the record provisional. Writes NAME.json and NAME.md.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx

from vllm_mlx.commands.evidence import UNKNOWN, Answer, markdown, record
from vllm_mlx.commands.talk import DEFAULT_SERVER, TalkError

# The guide's smoke tests, and one that asks for a form.
SMOKE_TESTS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "Reply with pong"}], "max_tokens": 32},
    {"messages": [{"role": "user", "content": "Reply with exactly one sentence."}], "enable_thinking": False,
     "temperature": 0.0, "top_p": 1.0, "max_tokens": 32},
    {"messages": [{"role": "user", "content": "Give the name and the age of a person as JSON."}], "max_tokens": 128,
     "response_format": {"type": "json_object"}},
)  # fmt: skip


def run(parsed: argparse.Namespace) -> int:
    key = parsed.api_key or os.environ.get("VLLM_MLX_CLIENT_API_KEY")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    base = (parsed.server or DEFAULT_SERVER).rstrip("/").removesuffix("/v1")
    payloads = [_read_payload(path) for path in parsed.payload] or [dict(test) for test in SMOKE_TESTS]
    with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(10, read=parsed.timeout)) as client:
        facts = {"url": base, "client": parsed.client, "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"}
        facts |= read_facts(client)
        answers = [(payload, measure(client, payload)) for payload in payloads for _ in range(parsed.repeat)]
    made = record(facts, answers)
    name = parsed.out.removesuffix(".json").removesuffix(".md")
    try:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{name}.json").write_text(json.dumps(made, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        Path(f"{name}.md").write_text(markdown(made), encoding="utf-8")
    except OSError as error:
        raise TalkError(f"The record cannot be written to {name} ({error.strerror}).") from None
    print(f"Written: {name}.json, {name}.md")
    if made["provisional"]:
        print(f"Provisional: {made['provisional']}.")
    return 1 if any(answer.error for _, answer in answers) else 0


def _read_payload(path: str) -> dict[str, Any]:
    try:
        payload = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise TalkError(f"The payload {path} cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise TalkError(f"The payload {path} is not JSON: {error}.") from None
    if not isinstance(payload, dict) or not isinstance(payload.get("messages"), list):
        raise TalkError(f"The payload {path} is no chat request: it needs \"messages\".")
    return payload


def read_facts(client: httpx.Client) -> dict[str, Any]:
    """What the server says of itself; `unknown` where it says nothing."""
    try:
        capabilities = client.get("/v1/capabilities")
        diagnostics = client.get("/health/diagnostics")
    except httpx.TransportError as error:
        raise TalkError(f"No server answers at {client.base_url} ({error or type(error).__name__}).") from None
    if capabilities.status_code in (401, 403):
        raise TalkError("The server needs an API key: --api-key, or VLLM_MLX_CLIENT_API_KEY.")
    model = capabilities.json() if capabilities.is_success else {}
    program = (diagnostics.json().get("program") if diagnostics.is_success else None) or {}
    traits = model.get("model_traits") or {}
    return {
        "model": model.get("model_name") or UNKNOWN,
        "revision": traits.get("revision") or UNKNOWN,
        "environment": program.get("environment") or {},
        **{name: program.get(name, UNKNOWN) for name in ("version", "command", "interpreter", "install")},
    }


def measure(client: httpx.Client, payload: Mapping[str, Any]) -> Answer:
    """Send the payload, streamed so that the first token can be timed; failures are in the answer, not raised."""
    body = {"model": "default", **payload, "stream": True, "stream_options": {"include_usage": True},
            "include_diagnostics": True}  # fmt: skip
    started = time.perf_counter()
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                return Answer(error=f"HTTP {response.status_code}: {response.read().decode(errors='replace')[:500]}")
            return _fold(_chunks(response), started)
    except httpx.HTTPError as error:
        return Answer(error=f"{type(error).__name__}: {error}", total_s=time.perf_counter() - started)


def _chunks(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data:") and (data := line[5:].strip()) != "[DONE]":
            yield json.loads(data)


def _fold(chunks: Iterator[dict[str, Any]], started: float) -> Answer:
    text, reasoning = "", ""
    calls: dict[int, dict[str, Any]] = {}
    fields: dict[str, Any] = {}
    for chunk in chunks:
        if error := chunk.get("error"):
            fields["error"] = str(error.get("message", error) if isinstance(error, dict) else error)
        fields["usage"] = chunk.get("usage") or fields.get("usage", {})
        fields["diagnostics"] = chunk.get("diagnostics") or fields.get("diagnostics")
        for choice in chunk.get("choices") or ():
            delta = choice.get("delta") or {}
            text += delta.get("content") or ""
            reasoning += delta.get("reasoning_content") or delta.get("reasoning") or ""
            for call in delta.get("tool_calls") or ():
                known = calls.setdefault(call["index"], {"function": {"name": "", "arguments": ""}})
                for name, piece in (call.get("function") or {}).items():
                    known["function"][name] += piece or ""
            if "first_s" not in fields and (text or reasoning or calls):
                fields["first_s"] = time.perf_counter() - started
            fields["finish_reason"] = choice.get("finish_reason") or fields.get("finish_reason")
    total_s = time.perf_counter() - started
    return Answer(text, reasoning, tuple(calls[i] for i in sorted(calls)), total_s=total_s, **fields)
