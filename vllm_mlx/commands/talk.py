"""One conversation partner for `chat` and `run`: a server over HTTP, or a model in this process. Both stream alike."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import httpx

from vllm_mlx.errors import InvalidRequest, VllmMlxError
from vllm_mlx.generation.events import Finished
from vllm_mlx.parsers.events import ReasoningDelta, TextDelta

if TYPE_CHECKING:
    from vllm_mlx.offline.async_llm import AsyncLLM

DEFAULT_SERVER = "http://127.0.0.1:8000"
PROBE_TIMEOUT_S = 0.5


class TalkError(VllmMlxError):
    """The partner cannot answer; one sentence."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Part of an answer; `is_reasoning` is what the model thinks before it."""

    text: str
    is_reasoning: bool = False


@dataclass(frozen=True, slots=True)
class Numbers:
    """The last thing of an answer. Times in seconds."""

    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int
    first_s: float | None
    total_s: float
    finish_reason: str = "stop"

    def __str__(self) -> str:
        parts = [f"{self.num_prompt_tokens} + {self.num_completion_tokens} tokens"]
        if self.first_s is not None:
            if self.num_completion_tokens > 1 and self.total_s > self.first_s:
                parts.append(f"{(self.num_completion_tokens - 1) / (self.total_s - self.first_s):.1f} tokens/s")
            parts.append(f"first after {1000 * self.first_s:.0f} ms")
        if self.num_prompt_tokens:
            parts.append(f"{100 * self.num_cached_tokens // self.num_prompt_tokens} % cached")
        if self.finish_reason not in ("stop", "tool_calls"):
            parts.append(f"ended by {self.finish_reason}")
        return " · ".join(parts)


class Partner(Protocol):
    name: str

    def answer(self, body: dict[str, Any]) -> AsyncGenerator[Piece | Numbers, None]:
        """Answer an OpenAI chat body (`messages` and more); raises VllmMlxError. `Numbers` come last."""
        ...

    async def close(self) -> None: ...


class ServedModel:
    """A model behind a server's OpenAI protocol."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._client = httpx.AsyncClient(headers=headers, timeout=httpx.Timeout(10, read=None))
        self.name = self._url

    async def connect(self) -> ServedModel:
        """Learn the model's name; raises TalkError when there is no server, or it wants a key."""
        try:
            answer = await self._client.get(f"{self._url}/v1/models")
        except httpx.HTTPError as error:
            raise TalkError(f"No server answers at {self._url} ({type(error).__name__}).") from None
        self._check(answer.status_code, answer.content)
        self.name = f"{answer.json()['data'][0]['id']} at {self._url}"
        return self

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Piece | Numbers, None]:
        started, first, usage, reason = time.monotonic(), None, None, "stop"
        asked = {"model": "default", **body, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._client.stream("POST", f"{self._url}/v1/chat/completions", json=asked) as answer:
                if answer.status_code != 200:
                    self._check(answer.status_code, await answer.aread())
                async for line in answer.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        raise TalkError(chunk["error"]["message"])
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", ()):
                        reason = choice.get("finish_reason") or reason
                        delta = choice["delta"]
                        for field in ("reasoning_content", "content"):
                            if delta.get(field):
                                first = first or time.monotonic()
                                yield Piece(delta[field], field == "reasoning_content")
        except httpx.HTTPError as error:
            raise TalkError(f"The connection to {self._url} was lost ({type(error).__name__}).") from None
        if usage is None:
            raise TalkError(f"The connection to {self._url} broke off before the answer was complete.")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        total_s = time.monotonic() - started
        first_s = None if first is None else first - started
        yield Numbers(usage["prompt_tokens"], usage["completion_tokens"], cached, first_s, total_s, reason)

    async def close(self) -> None:
        await self._client.aclose()

    def _check(self, status: int, content: bytes) -> None:
        if status == 200:
            return
        try:
            message = json.loads(content)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = f"{self._url} answered with status {status}."
        raise TalkError(message)


class LocalModel:
    """A model in this process."""

    def __init__(self, llm: AsyncLLM) -> None:
        self._llm = llm
        self.name = llm.describe()

    @classmethod
    async def load(cls, model: str) -> LocalModel:
        from vllm_mlx.offline.async_llm import AsyncLLM  # brings the whole engine

        return cls(await AsyncLLM.load(model, runtime_mode="simple"))

    async def answer(self, body: dict[str, Any]) -> AsyncGenerator[Piece | Numbers, None]:
        started, first = time.monotonic(), None
        async for event in self._llm.events(**body):
            match event:
                case TextDelta() | ReasoningDelta():
                    first = first or time.monotonic()
                    yield Piece(event.text, isinstance(event, ReasoningDelta))
                case Finished():
                    if event.reason == "error":
                        raise TalkError(event.error or "The model failed while it answered.")
                    usage, total_s = event.usage, time.monotonic() - started
                    yield Numbers(
                        usage.num_prompt_tokens, usage.num_completion_tokens, usage.num_cached_tokens,
                        None if first is None else first - started, total_s, event.reason,
                    )  # fmt: skip

    async def close(self) -> None:
        await self._llm.close()


async def find_partner(model: str | None, server: str | None, api_key: str | None) -> Partner:
    """The server that is named, else the model that is, else a server on this machine, else the built-in model."""
    if server is not None:
        return await ServedModel(server, api_key).connect()
    if model is None and await _is_served(DEFAULT_SERVER):
        return await ServedModel(DEFAULT_SERVER, api_key).connect()
    print(f"Loading {model or 'the built-in demo model'} …", file=sys.stderr)
    return await LocalModel.load(model or "demo")


async def _is_served(url: str) -> bool:
    async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S) as client:
        try:
            health = await client.get(f"{url}/health")
            return bool(health.json().get("model_loaded"))
        except (httpx.HTTPError, ValueError, AttributeError):
            return False


def image_part(path: str) -> dict[str, Any]:
    """A picture's file, or URL, as a part of an OpenAI message."""
    if path.startswith(("http://", "https://", "data:")):
        return {"type": "image_url", "image_url": {"url": path}}
    file = Path(path).expanduser()
    try:
        content = file.read_bytes()
    except OSError as error:
        raise TalkError(f"The picture {path} cannot be read ({error.strerror}).") from None
    kind = _media_type(content, path)
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{base64.b64encode(content).decode()}"}}


def _media_type(content: bytes, path: str) -> str:
    """By what the file holds; raises TalkError, which names the file, for what cannot be read as a picture."""
    from PIL import Image  # with numpy, which only those wait for who send pictures

    from vllm_mlx.generation import pictures
    from vllm_mlx.generation.sources import Blob

    try:
        pictures.decode_image(Blob(content), "image")
        return Image.MIME[pictures.format_of(Blob(content), "image")]
    except InvalidRequest as error:
        raise TalkError(f"{path}: {error}") from None


def user_message(text: str, images: Sequence[str]) -> dict[str, Any]:
    if not images:
        return {"role": "user", "content": text}
    return {"role": "user", "content": [*(image_part(path) for path in images), {"type": "text", "text": text}]}
