"""Replays long sessions of three coding agents' request shapes, and counts what the prefix cache gives each prompt.

    python -m tools.agent_sessions                      all shapes on all models, 30 turns, 20,000 tokens of beginning
    python -m tools.agent_sessions --url http://127.0.0.1:8000 --turns 10      a server that runs already

The texts are generated; sizes, fields and order are those that the agents were seen to send. What moves in their
prompts moves here: a billing line and a token counter that differ in each request, cache_control on another block each
time, system turns in the middle, reasoning that comes back, and (`--change-tools`) a tool that joins half-way. Each
answer comes back with the next request, followed by a call that the client is made to have read in it, and its result.
Models are tiny and random, one for each kind of cache: what is counted does not depend on what they say.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from vllm_mlx.bench import servers
from vllm_mlx.bench.model import build, make_text, make_vocabulary

MODELS = {"attention": "qwen3", "sliding window": "gemma3_text", "hybrid": "qwen3_next"}
WANTED = 0.97
CHARS_PER_TOKEN = 3.9
"""Of the benchmark's tokenizer on these texts and their JSON."""
TEMPLATE = """\
{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content + '\\n\\n' }}{% endif %}
{%- if tools %}{{ 'Tools:\\n' }}{% for tool in tools %}{{ tool | tojson + '\\n' }}{% endfor %}
{{- 'Call one as <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>' }}{% endif %}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{% if not (loop.first and m.role == 'system') %}
{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}
{%- if m.role == 'tool' %}{{ '<tool_response>\\n' + m.content + '\\n</tool_response>' }}
{%- elif m.role == 'assistant' and m.reasoning_content and loop.index0 > ns.last %}
{{- '<think>\\n' + m.reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + m.content.lstrip('\\n') }}
{%- else %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{% if (loop.first and m.content) or not loop.first %}{{ '\\n' }}{% endif %}
{{- '<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


@dataclass(frozen=True, slots=True)
class Turn:
    """One request's prompt, in tokens, and how many of them came from the cache."""

    num_prompt: int
    num_cached: int


@dataclass(frozen=True, slots=True)
class Scale:
    """Sizes of a session. `base_chars` is what system text and tools have together."""

    num_turns: int = 30
    base_chars: int = int(20_000 * CHARS_PER_TOKEN)
    result_chars: int = 500
    answer_tokens: int = 32
    user_every: int = 8
    max_tools: int = 99
    changes_tools: bool = False


class Writer:
    """Generated words, the same for one seed."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._words = make_vocabulary()

    def text(self, num_chars: int) -> str:
        return make_text(self._rng, self._words, num_chars // 4 + 1)[:num_chars].strip()

    def parameters(self, num_chars: int) -> dict[str, Any]:
        names = [self.text(9).replace(" ", "_").replace(".", "").lower() or "name" for _ in range(3)]
        described = {name: {"type": "string", "description": self.text(num_chars // 3)} for name in names}
        return {"type": "object", "properties": described, "required": names[:1], "additionalProperties": False}


class Session:
    """A conversation that one agent has. `next_request` is what it sends now; `take` reads the answer."""

    path: str
    headers: dict[str, str]
    num_tools: int
    system_share: float
    """Of the beginning; the rest is tools."""
    size = 1.0
    """What its JSON adds to a prompt, or leaves out of it, beside the text."""

    def __init__(self, scale: Scale, seed: int = 1) -> None:
        self.scale = scale
        self.write = Writer(seed)
        self.turn = 0
        base = scale.base_chars * self.size
        self.system = self.write.text(int(base * self.system_share))
        num_tools = min(self.num_tools, scale.max_tools)
        chars = int(base * (1 - self.system_share) / num_tools)
        self.tools = [self.tool(f"tool_{i}", chars) for i in range(num_tools)]
        self.start()

    def start(self) -> None:
        """The first turns."""
        raise NotImplementedError

    def tool(self, name: str, chars: int) -> dict[str, Any]:
        raise NotImplementedError

    def body(self) -> dict[str, Any]:
        raise NotImplementedError

    def answered(self, answer: dict[str, Any], call_id: str, result: str | None) -> None:
        """Append the answer, a call and its result; or, without a result, the answer and a new word of the user."""
        raise NotImplementedError

    def fold(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        """A streamed answer put together, as the client does; AssertionError when the events are not as they must."""
        raise NotImplementedError

    def usage(self, answer: dict[str, Any]) -> Turn:
        raise NotImplementedError

    def next_request(self) -> dict[str, Any]:
        if self.scale.changes_tools and self.turn == self.scale.num_turns // 2:
            self.tools.append(self.tool("tool_that_joined", min(800, self.scale.base_chars // 10)))
        return self.body()

    def take(self, answer: dict[str, Any]) -> Turn:
        self.turn += 1
        is_over = self.turn % self.scale.user_every == 0
        result = None if is_over else self.write.text(self.scale.result_chars)
        self.answered(answer, f"call_{self.turn:04d}", result)
        return self.usage(answer)


class ClaudeCode(Session):
    """Anthropic Messages: billing line, counters, system turns inside, cache_control that moves, thinking back."""

    path = "/v1/messages?beta=true"
    headers = {
        "anthropic-version": "2023-06-01",
        "anthropic-beta": "claude-code-20250219,interleaved-thinking-2025-05-14,context-management-2025-06-27",
        "x-claude-code-session-id": "0b5f3a52-session",
        "x-app": "cli",
    }
    num_tools = 24
    system_share = 0.09

    def start(self) -> None:
        self.messages: list[dict[str, Any]] = [
            {"role": "user", "content": [
                {"type": "text", "text": f"<system-reminder>\n{self.write.text(280)}\n</system-reminder>"},
                {"type": "text", "text": self.write.text(120)}]},
            {"role": "system", "content": self.write.text(self.scale.base_chars // 13)},
        ]  # fmt: skip

    def tool(self, name: str, chars: int) -> dict[str, Any]:
        schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **self.write.parameters(chars // 3)}
        return {"name": name, "description": self.write.text(chars // 2), "input_schema": schema}

    def body(self) -> dict[str, Any]:
        left = 200_000 - 731 * self.turn
        counters = [f"<total_tokens>{left + 731 * i} tokens left</total_tokens>" for i in range(self.turn, -1, -1)]
        billing = f"x-anthropic-billing-header: cc_version=2.1.197.{self.turn:03x}; cch={self.turn * 7919 % 65536:04x};"
        marked = {"cache_control": {"type": "ephemeral"}}
        messages = json.loads(json.dumps(self.messages))
        last = messages[-1]
        if isinstance(last["content"], str):
            last["content"] = [{"type": "text", "text": last["content"]}]
        last["content"][-1].update(marked)
        if self.turn:
            messages.append({"role": "system", "content": f"<total_tokens>{left} tokens left</total_tokens>"})
        return {
            "model": "claude-sonnet",
            "max_tokens": self.scale.answer_tokens,
            "system": [
                {"type": "text", "text": billing},
                {"type": "text", "text": self.system[:62], **marked},
                {"type": "text", "text": "\n".join([self.system[62:], *counters]), **marked},
            ],
            "messages": messages,
            "tools": self.tools,
            "metadata": {"user_id": "user"},
            "thinking": {"type": "adaptive"},
            "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
            "output_config": {"effort": "high"},
            "stream": True,
        }

    def fold(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        kinds = [event["type"] for event in events if event["type"] != "ping"]
        assert kinds[0] == "message_start" and kinds[-2:] == ["message_delta", "message_stop"], kinds
        blocks: list[dict[str, Any]] = []
        for event in events:
            if event["type"] == "content_block_start":
                assert event["index"] == len(blocks)
                blocks.append(event["content_block"])
            elif event["type"] == "content_block_delta" and event["delta"]["type"] == "text_delta":
                blocks[event["index"]]["text"] += event["delta"]["text"]
        assert kinds.count("content_block_stop") == len(blocks)
        return {"content": blocks, "usage": {**events[0]["message"]["usage"], **events[-2]["usage"]}}

    def answered(self, answer: dict[str, Any], call_id: str, result: str | None) -> None:
        thought = {"type": "thinking", "thinking": self.write.text(160), "signature": "c2ln"}
        said = [block for block in answer["content"] if block["type"] == "text"] or [{"type": "text", "text": "Well."}]
        if result is None:
            self.messages += [
                {"role": "assistant", "content": [thought, *said]},
                {"role": "user", "content": self.write.text(150)},
                {"role": "system", "content": f"<system-reminder>\n{self.write.text(200)}\n</system-reminder>"},
            ]
            return
        call = {"type": "tool_use", "id": call_id, "name": "tool_1", "input": {"command": self.write.text(60)}}
        outcome = {"type": "tool_result", "tool_use_id": call_id, "content": result, "is_error": False}
        self.messages += [
            {"role": "assistant", "content": [thought, *said, call]},
            {"role": "user", "content": [outcome]},
        ]

    def usage(self, answer: dict[str, Any]) -> Turn:
        usage = answer["usage"]
        parts = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
        return Turn(sum(usage[part] for part in parts), usage["cache_read_input_tokens"])


class Codex(Session):
    """OpenAI Responses, the history sent each time: developer turns, reasoning back, namespace and hosted tools."""

    path = "/v1/responses"
    headers = {"originator": "codex_exec", "session-id": "s-1", "thread-id": "t-1", "x-client-request-id": "t-1"}
    num_tools = 8
    system_share = 0.45
    size = 1.2

    def start(self) -> None:
        def said(role: str, *texts: str) -> dict[str, Any]:
            return {"type": "message", "role": role, "content": [{"type": "input_text", "text": t} for t in texts]}

        self.said = said
        self.items: list[dict[str, Any]] = [
            said("developer", self.system),
            said("developer", self.write.text(600), self.write.text(300)),
            said("user", self.write.text(400)),
            said("user", self.write.text(120)),
        ]

    def tool(self, name: str, chars: int) -> dict[str, Any]:
        function = {"type": "function", "name": name, "description": self.write.text(chars // 2), "strict": False}
        return {**function, "parameters": self.write.parameters(chars // 3)}

    def body(self) -> dict[str, Any]:
        nested = {"type": "namespace", "name": "agents", "description": "Others", "tools": self.tools[:3]}
        metadata = {"turn": str(self.turn), "place": "here"}
        return {
            "model": "gpt-5-codex",
            "stream": True,
            "store": False,
            "input": self.items,
            "tools": [nested, {"type": "web_search", "external_web_access": False}, *self.tools[3:]],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "reasoning": {"summary": "auto"},
            "include": ["reasoning.encrypted_content"],
            "prompt_cache_key": "s-1",
            "client_metadata": dict(sorted(metadata.items(), reverse=bool(self.turn % 2))),
            "max_output_tokens": self.scale.answer_tokens,
        }

    def fold(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        kinds = [event["type"].removeprefix("response.") for event in events]
        assert kinds[:2] == ["created", "in_progress"] and kinds[-1] in ("completed", "incomplete"), kinds
        done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        answer: dict[str, Any] = events[-1]["response"]
        assert done == answer["output"]
        return answer

    def answered(self, answer: dict[str, Any], call_id: str, result: str | None) -> None:
        thought = {"type": "reasoning", "id": f"rs_{self.turn}", "summary": []}
        text = [{"type": "reasoning_text", "text": self.write.text(160)}]
        said = [item for item in answer["output"] if item["type"] == "message"]
        self.items += [{**thought, "content": text}, *said]
        if result is None:
            self.items.append(self.said("user", self.write.text(150)))
            return
        arguments = json.dumps({"cmd": self.write.text(60)})
        call = {"type": "function_call", "id": f"fc_{self.turn}", "status": "completed", "name": "tool_4"}
        self.items += [
            {**call, "call_id": call_id, "arguments": arguments},
            {"type": "function_call_output", "call_id": call_id, "output": result},
        ]

    def usage(self, answer: dict[str, Any]) -> Turn:
        usage = answer["usage"]
        return Turn(usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"])


class OpenCode(Session):
    """OpenAI Chat Completions: string contents, empty content beside calls, a title request at the start."""

    path = "/v1/chat/completions"
    headers = {"x-session-id": "ses_1", "x-session-affinity": "ses_1"}
    num_tools = 10
    system_share = 0.31
    size = 1.25

    def start(self) -> None:
        self.messages: list[dict[str, Any]] = [
            {"role": "system", "content": self.system},
            {"role": "user", "content": self.write.text(120)},
        ]

    def tool(self, name: str, chars: int) -> dict[str, Any]:
        function = {"name": name, "description": self.write.text(chars // 2)}
        return {"type": "function", "function": {**function, "parameters": self.write.parameters(chars // 3)}}

    def title_request(self) -> dict[str, Any]:
        texts = (("system", 2096), ("user", 40), ("user", 22))
        return {
            "model": "gpt-5-nano",
            "max_tokens": self.scale.answer_tokens,
            "messages": [{"role": role, "content": self.write.text(chars)} for role, chars in texts],
        }

    def body(self) -> dict[str, Any]:
        return {
            "model": "local",
            "max_tokens": self.scale.answer_tokens,
            "messages": self.messages,
            "tools": self.tools,
            "tool_choice": "auto",
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def fold(self, events: list[dict[str, Any]]) -> dict[str, Any]:
        *chunks, last = events
        assert last["choices"] == [] and all(chunk["usage"] is None for chunk in chunks)
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons[-1] and not any(reasons[:-1]), reasons
        text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        return {"choices": [{"message": {"content": text}}], "usage": last["usage"]}

    def answered(self, answer: dict[str, Any], call_id: str, result: str | None) -> None:
        said = answer["choices"][0]["message"]["content"] or "Well."
        if result is None:
            self.messages += [
                {"role": "assistant", "content": said},
                {"role": "user", "content": self.write.text(150)},
            ]
            return
        function = {"name": "tool_1", "arguments": json.dumps({"command": self.write.text(60)})}
        call = {"id": call_id, "type": "function", "function": function}
        # With a call this agent sends no words.
        self.messages += [
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call_id, "content": result},
        ]

    def usage(self, answer: dict[str, Any]) -> Turn:
        usage = answer["usage"]
        return Turn(usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"])


SHAPES: dict[str, Callable[..., Session]] = {"claude-code": ClaudeCode, "codex": Codex, "opencode": OpenCode}


async def play(url: str, session: Session) -> list[Turn]:
    """The whole session against a server; an answer other than 200 is an error."""
    turns = []
    async with httpx.AsyncClient(base_url=url, headers=session.headers, timeout=600) as client:

        async def ask(body: dict[str, Any]) -> dict[str, Any]:
            answer = await client.post(session.path, json=body)
            if answer.status_code != 200:
                raise RuntimeError(f"{session.path} answered {answer.status_code}: {answer.text[:500]}")
            if body.get("stream"):
                data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
                return session.fold([json.loads(item) for item in data if item != "[DONE]"])
            found: dict[str, Any] = answer.json()
            return found

        (await client.head("/")).raise_for_status()
        title = asyncio.create_task(ask(session.title_request())) if isinstance(session, OpenCode) else None
        for _ in range(session.scale.num_turns):
            turns.append(session.take(await ask(session.next_request())))
        if title is not None:
            await title
    return turns


def share(turns: Sequence[Turn]) -> float:
    """Of the prompt tokens of all turns but the first, the share that came from the cache."""
    return sum(t.num_cached for t in turns[1:]) / sum(t.num_prompt for t in turns[1:])


def build_model(name: str, folder: Path) -> Path:
    """A tiny random model of one kind with the benchmark's tokenizer, a long context, and a template with tools."""
    import mlx.core as mx

    from tests import tiny_models

    out = folder / f"agents-{name}"
    out.mkdir(parents=True, exist_ok=True)
    source = build(folder, "5m")
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(source / file, out / file)
    config = {**tiny_models.TEXT[name], "vocab_size": 8192, "max_position_embeddings": 131072}
    config.update(model_type=name, eos_token_id=[2, 0])
    if "sliding_window" in config:
        config["sliding_window"] = 512
    tokenizer_config = json.loads((out / "tokenizer_config.json").read_text())
    tokenizer_config.update(chat_template=TEMPLATE, model_max_length=131072)
    tiny_models.write_json(out / "tokenizer_config.json", tokenizer_config)
    (out / "chat_template.jinja").write_text(TEMPLATE)
    tiny_models.write_json(out / "config.json", config)
    module = __import__(f"mlx_lm.models.{name}", fromlist=["Model"])
    mx.random.seed(1)
    model = module.Model(module.ModelArgs.from_dict(config))
    tiny_models.randomize(model)
    tiny_models.save_weights(model, out, "float32")
    return out


async def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.agent_sessions", description=__doc__.splitlines()[0])
    parser.add_argument("--url", help="a server that runs already, without /v1")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--tokens", type=int, default=20_000, help="of system text and tools")
    parser.add_argument("--change-tools", action="store_true", help="a tool joins half-way")
    parser.add_argument("--model", choices=sorted(MODELS), action="append")
    parser.add_argument("--shape", choices=sorted(SHAPES), action="append")
    parser.add_argument("--verbose", action="store_true", help="every turn")
    given = parser.parse_args(arguments)
    scale = Scale(given.turns, int(given.tokens * CHARS_PER_TOKEN), changes_tools=given.change_tools)
    shares = []
    print("| cache | shape | first prompt | last prompt | prompt tokens, turns 2 on | from the cache |")
    print("| --- | --- | --- | --- | --- | --- |")
    async with AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for kind, url in await _targets(given, folder, stack):
            async with url as address:
                for shape in given.shape or SHAPES:
                    turns = await play(address, SHAPES[shape](scale))
                    shares.append(share(turns))
                    total = sum(t.num_prompt for t in turns[1:])
                    print(f"| {kind} | {shape} | {turns[0].num_prompt} | {turns[-1].num_prompt} | {total} | "
                          f"{shares[-1]:.2%} |", flush=True)  # fmt: skip
                    if given.verbose:
                        print(*(f"{t.num_cached}/{t.num_prompt}" for t in turns), flush=True)
    return 0 if min(shares) >= WANTED else 1


async def _targets(given: argparse.Namespace, folder: Path, stack: AsyncExitStack) -> Iterator[tuple[str, Any]]:
    if given.url:
        return iter([("as served", _address(given.url))])
    return ((kind, _serving(MODELS[kind], folder)) for kind in given.model or MODELS)


class _address:
    """An address that is there already."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    async def __aenter__(self) -> str:
        return self._url

    async def __aexit__(self, *error: object) -> None:
        pass


class _serving:
    """A server on a model built for it."""

    def __init__(self, name: str, folder: Path) -> None:
        self._name, self._folder = name, folder
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> str:
        model = await asyncio.to_thread(build_model, self._name, self._folder)
        port = servers.free_port()
        command = servers.ours(str(model), port, ["--repetition-policy", "off"])
        endpoint, _ = await self._stack.enter_async_context(servers.running(command, port, "default"))
        return endpoint.url.removesuffix("/v1")

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()


if __name__ == "__main__":
    from vllm_mlx import blas

    blas.load()
    raise SystemExit(asyncio.run(main(sys.argv[1:])))
