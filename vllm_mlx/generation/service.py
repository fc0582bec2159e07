"""The one place where a request becomes output events. asyncio thread; heavy work goes to small bounded pools.

    permit ─► checks, sampling ─► media ─► prompt, grammar ─► engine ─► text ─► events
             └──────────── errors are raised here ────────┘   └─ errors end the stream ─┘

Everything before the engine raises its error at the first `__anext__`, so that a protocol can still answer with a
status. From `Accepted` on, the stream always ends with exactly one `Finished`. Closing the iterator cancels.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from vllm_mlx.engine.request import Request, SamplingParams
from vllm_mlx.engine.step import CacheReport, FinishReason, Timings, TokenEvent
from vllm_mlx.errors import Cancelled, DeadlineExceeded, InvalidRequest, Unavailable
from vllm_mlx.generation import diagnostics
from vllm_mlx.generation.adapters import AdapterRegistry
from vllm_mlx.generation.admission import Admission, Pressure
from vllm_mlx.generation.checks import check_request
from vllm_mlx.generation.defaults import Provenance, choose_sampling
from vllm_mlx.generation.detokenizer import TokenTable
from vllm_mlx.generation.engine_port import EnginePort, Tokenizer
from vllm_mlx.generation.events import (
    Accepted,
    Finished,
    GenerationUsage,
    KeepAlive,
    LogprobsDelta,
    OutputEvent,
)
from vllm_mlx.generation.grammar import GrammarCompiler
from vllm_mlx.generation.mailbox import Mailbox, pump
from vllm_mlx.generation.output import OutputAssembler
from vllm_mlx.generation.prompt import BuiltPrompt, MediaExpander, PromptBuilder
from vllm_mlx.generation.reading import AnswerReader, Reading, named_format
from vllm_mlx.generation.request import GenerationRequest, MediaPart
from vllm_mlx.generation.steady import steady
from vllm_mlx.settings import AgentSettings

if TYPE_CHECKING:
    from vllm_mlx.models.profile import ModelProfile
    from vllm_mlx.settings import GuardSettings, LimitSettings, ParsingSettings, SamplingSettings

log = logging.getLogger(__name__)
T = TypeVar("T")

DEADLINE_GRACE_S = 2.0
"""How long past its deadline a request waits for the engine's own final event."""
_CUTS = ("length", "repetition", "cancelled")
"""Ends that come from outside of what the model was writing."""
FINAL_EVENT_WAIT_S = 1.0
"""How long a stop string waits for the engine's numbers before it goes without."""


class LoadsMedia(Protocol):
    """`media.MediaLoader`: media parts to decoded images and videos. Blocks; runs in a worker thread."""

    def load(self, parts: Sequence[MediaPart], *, deadline: float | None = None) -> tuple[list[Any], list[Any]]: ...


@dataclass(eq=False)
class Job:
    """One generation being prepared or run; `adapter` is the key of its LoRA adapter. Event loop only."""

    request: GenerationRequest
    arrived: float
    deadline: float
    adapter: str = ""
    is_cancelled: bool = False


@dataclass(frozen=True)
class Prepared:
    """All that a generation needs once the engine has its request."""

    engine_request: Request
    built: BuiltPrompt
    provenance: Provenance
    assembler: OutputAssembler


@dataclass(slots=True)
class Outcome:
    """What the engine has told about a request so far."""

    cache: CacheReport | None = None
    timings: Timings | None = None
    max_batch_rows: int = 1
    final: TokenEvent | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[Any] = field(default_factory=list)

    def take(self, events: Sequence[TokenEvent]) -> None:
        """Read a batch of events; `token_ids` and `logprobs` are the batch's."""
        self.token_ids, self.logprobs = [], []
        for event in events:
            self.token_ids.extend(event.token_ids)
            self.logprobs.extend(event.logprobs)
            self.cache = event.cache or self.cache
            self.timings = event.timings or self.timings
            self.max_batch_rows = max(self.max_batch_rows, event.max_batch_rows)
            if event.finish_reason is not None:
                self.final = event


class GenerationService:
    """Generates with one model. Several services may share an `Admission`."""

    def __init__(
        self,
        *,
        engine: EnginePort,
        tokenizer: Tokenizer,
        profile: ModelProfile,
        admission: Admission,
        sampling: SamplingSettings,
        limits: LimitSettings,
        guards: GuardSettings,
        parsing: ParsingSettings,
        media: LoadsMedia | None = None,
        expander: MediaExpander | None = None,
        grammar: GrammarCompiler | None = None,
        adapters: AdapterRegistry | None = None,
        agents: AgentSettings | None = None,
        keep_alive_s: float = 5.0,
        prompt_workers: int = 2,
        media_workers: int = 4,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._profile = profile
        self._admission = admission
        self._sampling = sampling
        self._limits = limits
        self._guards = guards
        self._parsing = parsing
        self._agents = agents or AgentSettings()
        self._media = media
        self._grammar = grammar
        self._adapters = adapters or AdapterRegistry()
        self._keep_alive_s = keep_alive_s
        self._clock = clock
        tool_format = named_format(parsing.tool_call_parser)
        self._builder = PromptBuilder(tokenizer, profile, limits, sampling, expander, tool_format)
        self._table = TokenTable(tokenizer)
        self._reader = AnswerReader(tokenizer, self._table, self._builder, parsing, grammar)
        self._prompt_pool = ThreadPoolExecutor(prompt_workers, "prompt")
        # Downloads wait for the network; they must not keep prompts waiting.
        self._media_pool = ThreadPoolExecutor(media_workers, "media")
        self._prompt_pool.submit(self._warm_up)
        self._jobs: dict[str, Job] = {}

    # ── for protocols ───────────────────────────────────────────────────────────────────────────────────────────────

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[OutputEvent, None]:
        """The request's events: `Accepted` first, one `Finished` last. Close it (`aclose`) to cancel."""
        arrived = self._clock()
        if request.id in self._jobs:
            raise InvalidRequest(f"A request with the id {request.id!r} is being served.", param="request_id")
        async with self._admission.permit(), self._adapters.use(request.adapter) as adapter:
            timeout_s = min(request.timeout_s or self._limits.timeout_s, self._limits.timeout_s)
            job = Job(request, arrived, arrived + timeout_s, adapter)
            self._jobs[request.id] = job
            try:
                prepared = await self._prepare(job)
                async with aclosing(self._run(job, prepared)) as events:
                    async for event in events:
                        yield event
            finally:
                self._jobs.pop(request.id, None)

    def cancel(self, request_id: str) -> bool:
        """End a generation early with what it has; False when the id is not running."""
        job = self._jobs.get(request_id)
        if job is None:
            return False
        job.is_cancelled = True
        self._engine.cancel(request_id)
        return True

    async def count_prompt_tokens(self, request: GenerationRequest) -> int:
        """Tokens the request's prompt would have: exactly what `generate` would report."""
        check_request(request, vocab_size=self._profile.vocab_size)
        request = steady(request, self._agents)
        request, images, videos = await self._load_media(request, None)
        prompt, _ = await self._in_pool(self._prompt_pool, lambda: self._builder.tokens(request, images, videos))
        return len(prompt)

    async def tokenize_prompt(self, request: GenerationRequest, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Token ids of the request's prompt, text or chat."""
        if isinstance(request.prompt, str) and (not add_special_tokens or not request.prompt):
            text = request.prompt
            return tuple(await self._in_pool(self._prompt_pool, lambda: self._encode(text, add_special_tokens)))
        check_request(request, vocab_size=self._profile.vocab_size)
        request = steady(request, self._agents)
        request, images, videos = await self._load_media(request, None)
        prompt, _ = await self._in_pool(self._prompt_pool, lambda: self._builder.tokens(request, images, videos))
        return prompt.token_ids

    async def detokenize(self, token_ids: tuple[int, ...]) -> str:
        """Text of token ids, special tokens shown."""
        ids = list(token_ids)
        return await self._in_pool(
            self._prompt_pool,
            lambda: self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        )

    def token_text(self, token_id: int) -> str:
        """Text of one token by itself."""
        return self._table.token_text(token_id)

    @property
    def num_live(self) -> int:
        return len(self._jobs)

    def close(self) -> None:
        """Drop the worker threads; call it when nothing runs any more."""
        self._prompt_pool.shutdown(wait=False, cancel_futures=True)
        self._media_pool.shutdown(wait=False, cancel_futures=True)

    def _warm_up(self) -> None:
        """What the first request would otherwise wait for (the grammar's view of a large vocabulary takes seconds)."""
        self._builder.warm_up()
        if self._grammar is not None:
            try:
                self._grammar.prepare()
            except InvalidRequest as error:
                log.warning("%s", error)

    # ── before the engine ───────────────────────────────────────────────────────────────────────────────────────────

    async def _prepare(self, job: Job) -> Prepared:
        request = job.request
        check_request(request, vocab_size=self._profile.vocab_size)
        if request.num_prompt_logprobs is not None and not self._profile.scores_prompts:
            raise InvalidRequest(
                f"{self._profile.name} reads its prompts whole and has no log-probabilities of their tokens.",
                param="prompt_logprobs",
            )
        request = steady(request, self._agents)
        sampling, provenance = choose_sampling(
            request.sampling, self._sampling, self._profile.generation_defaults, vocab_size=self._profile.vocab_size
        )
        status = self._engine.status
        if not status.is_healthy:
            raise Unavailable(f"The engine cannot serve now: {status.failure or 'it has failed'}.")
        try:
            async with asyncio.timeout(max(0.0, job.deadline - self._clock())):
                request, images, videos = await self._load_media(request, job.deadline)
                pressure = self._admission.pressure
                built, reading = await self._in_pool(
                    self._prompt_pool, lambda: self._build(request, images, videos, pressure)
                )
        except TimeoutError:
            raise DeadlineExceeded(_deadline_sentence(job) + " before its prompt was ready.") from None
        if job.is_cancelled:
            raise Cancelled("The request was cancelled.")
        engine_request = self._engine_request(request, job, built, sampling, reading)
        return Prepared(engine_request, built, provenance, reading.assembler)

    async def _load_media(
        self, request: GenerationRequest, deadline: float | None
    ) -> tuple[GenerationRequest, Sequence[Any], Sequence[Any]]:
        """The request as the template can take it, with its images and clips decoded."""
        if not any(isinstance(part, MediaPart) for message in request.messages for part in message.parts):
            return request, (), ()
        request, parts = self._builder.place_media(request)
        media = self._media
        if media is None:
            raise InvalidRequest("This server takes no images or videos.", param=parts[0].param)
        images, videos = await self._in_pool(self._media_pool, lambda: media.load(parts, deadline=deadline))
        return self._builder.frames_as_images(request, images, videos)

    def _build(
        self, request: GenerationRequest, images: Sequence[Any], videos: Sequence[Any], pressure: Pressure
    ) -> tuple[BuiltPrompt, Reading]:
        """The prompt, and how its answer will be read. In a worker thread."""
        built = self._builder.build(request, images, videos, pressure)
        return built, self._reader.read(request, built.text or "")

    def _engine_request(
        self,
        request: GenerationRequest,
        job: Job,
        built: BuiltPrompt,
        sampling: SamplingParams,
        reading: Reading,
    ) -> Request:
        # A grammar that is complete allows nothing but the end, so there the end is not ignored.
        ignores_end = request.sampling.ignore_eos and reading.make_constraint is None
        ends = frozenset() if ignores_end else frozenset(self._profile.eos_token_ids)
        return Request(
            id=request.id,
            prompt=built.prompt,
            max_tokens=built.max_tokens,
            sampling=sampling,
            stop_token_ids=ends | frozenset(request.stop_token_ids),
            ignore_eos=request.sampling.ignore_eos,
            deadline=job.deadline,
            priority=request.priority,
            client=request.client,
            # Keys and values made with an adapter are not the plain model's.
            namespace=f"{request.namespace}\0{job.adapter}" if job.adapter else request.namespace,
            adapter=job.adapter,
            make_constraint=reading.make_constraint,
            thinking=reading.thinking,
            repetition_policy=request.repetition_policy or self._guards.repetition_policy,
            num_prompt_logprobs=request.num_prompt_logprobs,
        )

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens) if text else []

    async def _in_pool(self, pool: Executor, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(pool, work)

    # ── with the engine ─────────────────────────────────────────────────────────────────────────────────────────────

    async def _run(self, job: Job, prepared: Prepared) -> AsyncGenerator[OutputEvent, None]:
        mailbox = Mailbox()
        submitted = self._clock()
        task = asyncio.create_task(pump(self._engine, prepared.engine_request, mailbox))
        try:
            await asyncio.sleep(0)  # a refusal by the engine can still be answered with a status
            if mailbox.error is not None:
                raise mailbox.error
            yield Accepted(
                job.request.id, len(prepared.engine_request.prompt), prepared.engine_request.prompt.token_ids
            )
            outcome = Outcome()
            try:
                async with aclosing(self._said(job, prepared, mailbox, outcome)) as events:
                    async for event in events:
                        yield event
                finished = self._finished(job, prepared, outcome, mailbox, submitted)
            except Exception as error:  # the request boundary: the client gets its final event
                log.exception("request %s failed", job.request.id)
                finished = self._failed(prepared, error)
            yield finished
        finally:
            task.cancel()  # leaving the engine's stream early cancels there too
            await asyncio.wait({task})

    async def _said(
        self, job: Job, prepared: Prepared, mailbox: Mailbox, outcome: Outcome
    ) -> AsyncGenerator[OutputEvent, None]:
        """Everything between Accepted and Finished. On return `outcome` says how it ended."""
        assembler = prepared.assembler
        hard_deadline = job.deadline + DEADLINE_GRACE_S
        # What happens to be ready together is said together, and silence is filled: both depend on the moment, so a
        # deterministic stream does neither.
        is_deterministic = self._sampling.deterministic
        keep_alive_s = math.inf if is_deterministic else self._keep_alive_s
        at_most = 1 if is_deterministic else None
        while outcome.final is None:
            now = self._clock()
            batch = await mailbox.take(min(keep_alive_s, hard_deadline - now), at_most=at_most)
            if not batch:
                if mailbox.is_closed or self._clock() >= hard_deadline:
                    break
                yield self._keep_alive(prepared)
                continue
            outcome.take(batch)
            if batch[0].prompt_logprobs:
                yield LogprobsDelta(tuple(assembler.entry(p) for p in batch[0].prompt_logprobs), is_prompt=True)
            stop_token_id = outcome.final.stop_token_id if outcome.final is not None else None
            for event in assembler.feed(outcome.token_ids, outcome.logprobs, stop_token_id):
                yield event
            if assembler.is_over:
                await self._stop_engine(job, mailbox, outcome)
                break
        for event in assembler.finish():
            yield event

    async def _stop_engine(self, job: Job, mailbox: Mailbox, outcome: Outcome) -> None:
        """The text ended the answer. The engine's last numbers are worth a short wait if none came yet."""
        if outcome.final is not None:
            return
        self._engine.cancel(job.request.id)
        until = self._clock() + FINAL_EVENT_WAIT_S
        while outcome.final is None and outcome.cache is None and self._clock() < until and not mailbox.is_closed:
            outcome.take(await mailbox.take(until - self._clock()))

    def _keep_alive(self, prepared: Prepared) -> KeepAlive:
        request = prepared.engine_request
        for progress in self._engine.status.requests:
            if progress.request_id == request.id:
                return KeepAlive(
                    progress.phase,
                    progress.num_prompt_tokens,
                    progress.num_computed_tokens,
                    progress.queue_position,
                    progress.predicted_wait_s,
                )
        return KeepAlive("waiting", len(request.prompt))

    # ── the end ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _finished(self, job: Job, prepared: Prepared, outcome: Outcome, mailbox: Mailbox, submitted: float) -> Finished:
        assembler, final = prepared.assembler, outcome.final
        reason, detail, error, stop = self._reason(job, prepared, outcome, mailbox)
        num_completion = assembler.num_tokens
        if final is not None and final.usage is not None and not assembler.is_over:
            num_completion = final.usage.num_completion_tokens
        cached = outcome.cache.num_cached_tokens if outcome.cache is not None else 0
        if final is not None and final.usage is not None:
            cached = final.usage.num_cached_tokens
        return Finished(
            reason,
            GenerationUsage(
                len(prepared.engine_request.prompt), num_completion, cached, assembler.num_reasoning_tokens
            ),
            stop_sequence=stop,
            detail=detail,
            error=error,
            is_cut=reason in _CUTS
            and (prepared.engine_request.make_constraint is not None or assembler.is_inside_call),
            diagnostics=diagnostics.describe(
                request=prepared.engine_request,
                built=prepared.built,
                provenance=prepared.provenance,
                arrived=job.arrived,
                submitted=submitted,
                finished=self._clock(),
                timings=outcome.timings,
                cache=outcome.cache,
                max_batch_rows=outcome.max_batch_rows,
                num_completion_tokens=num_completion,
                notes=assembler.notes,
                status=self._engine.status,
                admission=self._admission,
                max_context_tokens=self._profile.context_tokens,
                formats={"reasoning": self._parsing.reasoning_parser, "tools": self._parsing.tool_call_parser},
            ),
        )

    def _reason(
        self, job: Job, prepared: Prepared, outcome: Outcome, mailbox: Mailbox
    ) -> tuple[str, str | None, str | None, str | None]:
        """Finish reason, its detail, an error's sentence, and the stop sequence."""
        assembler, final = prepared.assembler, outcome.final
        if assembler.is_over:
            if assembler.stop_sequence is not None:
                return "stop", None, None, assembler.stop_sequence
            return "tool_calls", None, None, None
        if final is None:
            if mailbox.is_closed:
                return "error", None, str(mailbox.error or "The engine ended the request without a word."), None
            return "deadline", None, _deadline_sentence(job) + ".", None
        match final.finish_reason:
            case FinishReason.STOP:
                reason = "tool_calls" if assembler.num_complete_calls else "stop"
                return reason, final.detail, None, self._stop_token_text(job.request, final.stop_token_id)
            case FinishReason.ERROR:
                return "error", final.detail, final.detail or "The engine failed while it generated this answer.", None
            case FinishReason.DEADLINE:
                return "deadline", final.detail, _deadline_sentence(job) + ".", None
            case other:
                return str(other), final.detail, None, None

    def _stop_token_text(self, request: GenerationRequest, token_id: int | None) -> str | None:
        """Only a stop token the client named is a stop sequence; the end of a turn is none."""
        return self._table.token_text(token_id) if token_id in request.stop_token_ids and token_id is not None else None

    def _failed(self, prepared: Prepared, error: Exception) -> Finished:
        assembler = prepared.assembler
        return Finished(
            "error",
            GenerationUsage(
                len(prepared.engine_request.prompt), assembler.num_tokens, 0, assembler.num_reasoning_tokens
            ),
            error=f"The server failed while it wrote this answer ({type(error).__name__}).",
        )


def _deadline_sentence(job: Job) -> str:
    return f"The request did not finish within {job.deadline - job.arrived:g} seconds"
