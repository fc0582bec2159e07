"""What can be measured: a server behind a URL, or the engine in a process of its own. asyncio thread.

Both take the same conversations and give the same traces.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import httpx

from vllm_mlx.bench.client import Endpoint, stream_chat
from vllm_mlx.bench.measure import Summary, Trace, summarize
from vllm_mlx.bench.workloads import Conversation
from vllm_mlx.errors import VllmMlxError


class Target(Protocol):
    """`name` heads a column of the report; `pid` is its process, when it is one of ours."""

    name: str
    pid: int | None

    async def run(self, conversations: Sequence[Conversation], num_streams: int) -> list[Trace]:
        """Play the conversations, `num_streams` at a time; one trace for each turn."""
        ...


async def measure(target: Target, conversations: Sequence[Conversation], num_streams: int) -> Summary:
    """One run, with the processor time it took where that can be read."""
    before = cpu_seconds(target.pid)
    traces = await target.run(conversations, num_streams)
    after = cpu_seconds(target.pid)
    return summarize(traces, after - before if before is not None and after is not None else None)


def cpu_seconds(pid: int | None) -> float | None:
    """Processor time a process has taken so far, all its threads together (Linux)."""
    if pid is None:
        return None
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class HttpTarget:
    """An OpenAI-compatible server. `extra` is merged into each request's body."""

    def __init__(
        self, name: str, endpoint: Endpoint, extra: dict[str, Any] | None = None, pid: int | None = None
    ) -> None:
        self.name = name
        self.pid = pid
        self.endpoint = endpoint
        self._extra = extra or {}

    async def run(self, conversations: Sequence[Conversation], num_streams: int) -> list[Trace]:
        todo = iter(conversations)
        traces: list[Trace] = []

        async def stream() -> None:
            for conversation in todo:
                traces.extend(await self._play(conversation))

        await asyncio.gather(*(stream() for _ in range(min(num_streams, len(conversations)))))
        return traces

    async def token_ids(self, conversation: Conversation) -> list[int]:
        """The conversation's first prompt as this server (one of ours) tokenizes it."""
        url = self.endpoint.url.rstrip("/").removesuffix("/v1") + "/tokenize"
        headers = {"authorization": f"Bearer {self.endpoint.api_key}"} if self.endpoint.api_key else {}
        async with httpx.AsyncClient(timeout=60) as client:
            answer = await client.post(url, json={"messages": list(conversation.opening)}, headers=headers)
        answer.raise_for_status()
        return list(answer.json()["tokens"])

    async def _play(self, conversation: Conversation) -> list[Trace]:
        messages = list(conversation.opening)
        traces = []
        for turn, followup in enumerate((*conversation.followups, None)):
            body = self._body(messages, conversation.max_tokens) | dict(conversation.body)
            trace = await stream_chat(self.endpoint, body)
            trace.turn = turn
            traces.append(trace)
            if trace.error is not None or followup is None:
                break
            messages += [{"role": "assistant", "content": trace.text}, {"role": "user", "content": followup}]
        return traces

    def _body(self, messages: Iterable[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {
            "model": self.endpoint.model,
            "messages": list(messages),
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            **self._extra,
        }


class OfflineTarget:
    """`bench/offline.py` as a child process."""

    name = "engine in process"

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid: int | None = process.pid

    @classmethod
    async def start(cls, folder: str) -> OfflineTarget:
        """Load the model; raises when that fails."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "vllm_mlx.bench.offline", folder,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 30,
        )  # fmt: skip
        target = cls(process)
        await target._read()
        return target

    async def run(self, conversations: Sequence[Conversation], num_streams: int) -> list[Trace]:
        job = {"conversations": [asdict(c) for c in conversations], "num_streams": num_streams}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        await self._process.stdin.drain()
        return [Trace(**trace) for trace in await self._read()]

    async def seconds(self) -> dict[str, float]:
        """Seconds spent so far in each part of the engine's steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(b'"seconds"\n')
        await self._process.stdin.drain()
        return dict(await self._read())

    async def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def _read(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            raise VllmMlxError(f"The engine's process ended with code {await self._process.wait()}; see above.")
        return json.loads(line)
