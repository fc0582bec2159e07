"""Small honest fakes for the seams of generation: a byte tokenizer, a profile, an engine that says what it is told.

Used by the tests of generation and of the HTTP front; no MLX, no transformers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vllm_mlx.engine.request import MediaSpan, Request
from vllm_mlx.engine.step import (
    CacheReport,
    EngineStatus,
    FinishReason,
    Progress,
    Timings,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from vllm_mlx.generation.admission import Admission
from vllm_mlx.generation.service import GenerationService
from vllm_mlx.models.profile import ModelProfile
from vllm_mlx.settings import ParsingSettings, Settings

T = TypeVar("T")

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>")
MARKERS = ("<think>", "</think>", "<tool_call>", "</tool_call>")

CHATML = """\
{%- if tools %}<|im_start|>system
{%- if messages and messages[0].role == 'system' %}{{ '\\n' + messages[0].content }}{% endif %}
# Tools
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
<|im_end|>
{% endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' and loop.first and tools -%}
{%- elif message.role == 'tool' -%}
<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% else -%}
<|im_start|>{{ message.role }}
{{- '\\n' }}
{%- if message.reasoning_content and loop.last %}
<think>
{{ message.reasoning_content }}
</think>
{% endif %}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content or [] -%}
{%- if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part.type == 'text' %}{{ part.text }}{% endif -%}
{%- endfor %}{% endif %}
{%- for call in message.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>
{%- endfor %}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% elif open_thinking %}<think>
{% endif %}{% endif %}"""


@dataclass(frozen=True)
class AddedToken:
    content: str
    special: bool


class ByteTokenizer:
    """Ids 0-255 are bytes, then special tokens, then markers that are not special (as in Qwen3), then `extra` ones."""

    def __init__(
        self, chat_template: str | None = CHATML, bos_token: str | None = None, extra: Sequence[str] = ()
    ) -> None:
        self.chat_template = chat_template
        self.bos_token = bos_token
        names = [*SPECIAL_TOKENS, *MARKERS, *extra]
        self.added_tokens_decoder = {256 + i: AddedToken(n, n not in MARKERS) for i, n in enumerate(names)}
        self._ids = {t.content: i for i, t in self.added_tokens_decoder.items()}
        self._split = re.compile("(" + "|".join(re.escape(n) for n in names) + ")")
        self._environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        self._environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        self._environment.globals["raise_exception"] = _raise_template_error
        self._compiled: dict[str, Any] = {}

    @property
    def all_special_ids(self) -> list[int]:
        return [i for i, t in self.added_tokens_decoder.items() if t.special]

    def id_of(self, token: str) -> int:
        return self._ids[token]

    def get_vocab(self) -> dict[str, int]:
        return {**{f"<0x{b:02X}>": b for b in range(256)}, **self._ids}

    def __len__(self) -> int:
        return 256 + len(self._ids)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        ids = [self._ids[self.bos_token]] if add_special_tokens and self.bos_token else []
        for piece in self._split.split(text):
            if piece in self._ids:
                ids.append(self._ids[piece])
            else:
                ids.extend(piece.encode())
        return ids

    def decode(
        self, token_ids: Sequence[int], *, skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False
    ) -> str:
        out = bytearray()
        for token_id in token_ids:
            if token_id < 256:
                out.append(token_id)
                continue
            token = self.added_tokens_decoder.get(token_id)
            if token is not None and not (token.special and skip_special_tokens):
                out.extend(token.content.encode())
        return out.decode(errors="replace")

    def convert_ids_to_tokens(self, ids: int | Sequence[int]) -> Any:
        if isinstance(ids, int):
            if ids < 256:
                return f"<0x{ids:02X}>"
            token = self.added_tokens_decoder.get(ids)
            return token.content if token else None
        return [self.convert_ids_to_tokens(i) for i in ids]

    def convert_tokens_to_ids(self, token: str) -> int | None:
        return self.get_vocab().get(token)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        **kwargs: Any,
    ) -> Any:
        source = chat_template or self.chat_template
        if source is None:
            raise ValueError("no chat template")
        if source not in self._compiled:
            self._compiled[source] = self._environment.from_string(source)
        text = self._compiled[source].render(
            messages=conversation, tools=tools, add_generation_prompt=add_generation_prompt, **kwargs
        )
        if continue_final_message:
            content = conversation[-1]["content"].rstrip()
            text = text[: text.rindex(content) + len(content)]
        return self.encode(text, add_special_tokens=False) if tokenize else text


def _raise_template_error(message: str) -> None:
    raise TemplateError(message)


def fake_profile(tokenizer: ByteTokenizer | None = None, **changes: Any) -> ModelProfile:
    tokenizer = tokenizer or ByteTokenizer()
    profile = ModelProfile(
        name="fake",
        path=Path("fake"),
        model_type="fake",
        context_tokens=4096,
        vocab_size=len(tokenizer),
        eos_token_ids=(tokenizer.id_of("<|im_end|>"), tokenizer.id_of("<|endoftext|>")),
        chat_template=tokenizer.chat_template,
        special_tokens=SPECIAL_TOKENS,
        media_token_ids={"image": tokenizer.id_of("<|image_pad|>")},
    )
    return replace(profile, **changes)


class FakeExpander:
    """A processor for which each picture is four placeholder tokens; equal pictures have equal spans."""

    placeholders: Mapping[str, str] = {"image": "<|vision_start|><|image_pad|><|vision_end|>"}

    def __init__(self, tokenizer: ByteTokenizer) -> None:
        self._tokenizer = tokenizer
        self._pad = tokenizer.id_of("<|image_pad|>")

    def expand(self, text: str, images: Sequence[Any], videos: Sequence[Any]) -> tuple[list[int], list[MediaSpan]]:
        ids: list[int] = []
        spans: list[MediaSpan] = []
        left = list(images)
        for token_id in self._tokenizer.encode(text, add_special_tokens=False):
            if token_id == self._pad:
                pixels = np.asarray(left.pop(0))
                digest = hashlib.sha256(pixels.tobytes()).digest()
                spans.append(MediaSpan(len(ids), 4, "image", digest, {"pixels": pixels}))
                ids += [self._pad] * 4
            else:
                ids.append(token_id)
        return ids, spans


def fake_service(
    engine: FakeEngine | None = None,
    *,
    settings: Settings | None = None,
    profile: ModelProfile | None = None,
    max_running: int = 4,
    max_queue: int = 4,
    **options: Any,
) -> GenerationService:
    """The real generation service on a fake engine. `options` go to its constructor."""
    engine = engine or FakeEngine()
    settings = settings or Settings(parsing=ParsingSettings(reasoning_parser="qwen3", tool_call_parser="hermes"))
    options.setdefault("admission", Admission(max_running=max_running, max_queue=max_queue))
    return GenerationService(
        engine=engine,
        tokenizer=engine.tokenizer,
        profile=profile or fake_profile(engine.tokenizer),
        sampling=settings.sampling,
        limits=settings.limits,
        guards=settings.guards,
        parsing=settings.parsing,
        **options,
    )


Reply = str | Sequence[int] | Callable[[Request], "str | Sequence[int]"]


@dataclass
class FakeEngine:
    """Answers each request with `reply` (text, token ids, or a function of the request), then the end-of-turn token.

    It keeps the rules of the real one: one final event, `max_tokens` and deadline honoured, leaving the stream cancels.
    `tokens_per_event` groups tokens; `delay_s` is the time of a step; `prefill_s` the time before the first one.
    With `gate` set, tokens flow only while it is set: a test decides when.
    """

    tokenizer: ByteTokenizer = field(default_factory=ByteTokenizer)
    reply: Reply = "Hello!"
    tokens_per_event: int = 1
    delay_s: float = 0.0
    prefill_s: float = 0.0
    num_cached_tokens: int = 0
    ends_with: FinishReason = FinishReason.STOP
    detail: str | None = None
    fails_with: str | None = None
    fails_after: int = 0
    raises: Exception | None = None
    is_healthy: bool = True
    gate: asyncio.Event | None = None
    requests: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    _live: dict[str, Progress] = field(default_factory=dict)
    _stop_now: set[str] = field(default_factory=set)

    @property
    def status(self) -> EngineStatus:
        live = tuple(self._live.values())
        return EngineStatus(
            is_healthy=self.is_healthy,
            failure=None if self.is_healthy else "the fake engine was told to be ill",
            num_waiting=sum(p.phase == "waiting" for p in live),
            num_running=sum(p.phase != "waiting" for p in live),
            requests=live,
        )

    @property
    def num_live(self) -> int:
        return len(self._live)

    def cancel(self, request_id: str) -> None:
        self.cancelled.append(request_id)
        self._stop_now.add(request_id)

    async def call(self, job: Callable[[], T]) -> T:
        return job()

    async def stream(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        num_prompt = len(request.prompt)
        self._live[request.id] = Progress(
            request.id, "waiting", num_prompt, 0, 0, request.max_tokens, queue_position=len(self._live), arrived=0.0
        )
        is_over = False
        try:
            async for event in self._events(request):
                is_over = event.finish_reason is not None
                yield event
        finally:
            if not is_over:
                self.cancelled.append(request.id)
            self._live.pop(request.id, None)
            self._stop_now.discard(request.id)

    async def _events(self, request: Request) -> AsyncGenerator[TokenEvent, None]:
        now = asyncio.get_running_loop().time
        arrived = now()
        if self.raises is not None:
            raise self.raises
        if self.prefill_s:
            self._progress(request, phase="prefill", num_computed_tokens=len(request.prompt) // 2, queue_position=None)
            await asyncio.sleep(self.prefill_s)
        ids = self._reply_ids(request)
        eos = self.tokenizer.id_of("<|im_end|>")
        if self.ends_with is FinishReason.STOP and not request.ignore_eos:
            ids = [*ids, eos]
        is_cut = len(ids) > request.max_tokens
        ids = ids[: request.max_tokens]
        first_token: float | None = None
        num_done = 0

        def final(reason: FinishReason, tail: Sequence[int] = (), **more: Any) -> TokenEvent:
            return TokenEvent(
                request.id,
                tuple(tail),
                logprobs=self._logprobs(request, tail),
                finish_reason=reason,
                usage=Usage(len(request.prompt), num_done + len(tail), self.num_cached_tokens),
                timings=Timings(arrived, arrived, first_token, now()),
                cache=CacheReport(self.num_cached_tokens, self.num_cached_tokens, None),
                **more,
            )

        while True:
            await asyncio.sleep(self.delay_s)
            if self.gate is not None:
                await self.gate.wait()
            if request.id in self._stop_now:
                yield final(FinishReason.CANCELLED)
                return
            if request.deadline is not None and now() >= request.deadline:
                yield final(FinishReason.DEADLINE)
                return
            if self.fails_with is not None and num_done >= self.fails_after:
                yield final(FinishReason.ERROR, detail=self.fails_with)
                return
            batch = ids[num_done : num_done + self.tokens_per_event]
            first_token = first_token or now()
            if num_done + len(batch) >= len(ids):
                if is_cut:
                    yield final(FinishReason.LENGTH, batch)
                elif self.ends_with is FinishReason.STOP and not request.ignore_eos:
                    yield final(FinishReason.STOP, batch, stop_token_id=eos)
                else:
                    yield final(self.ends_with, batch, detail=self.detail)
                return
            num_done += len(batch)
            self._progress(request, phase="decode", num_completion_tokens=num_done, queue_position=None)
            yield TokenEvent(request.id, tuple(batch), logprobs=self._logprobs(request, batch))

    def _reply_ids(self, request: Request) -> list[int]:
        reply = self.reply(request) if callable(self.reply) else self.reply
        return self.tokenizer.encode(reply, add_special_tokens=False) if isinstance(reply, str) else list(reply)

    def _logprobs(self, request: Request, ids: Sequence[int]) -> tuple[TokenLogprobs, ...]:
        wanted = request.sampling.num_logprobs
        if wanted is None:
            return ()
        return tuple(TokenLogprobs(i, -0.5, tuple(((i + k) % 256, -0.5 - k) for k in range(wanted))) for i in ids)

    def _progress(self, request: Request, **changes: Any) -> None:
        if request.id in self._live:
            self._live[request.id] = replace(self._live[request.id], **changes)
