"""A whole engine on a real (tiny) model, driven step by step on the test's own thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vllm_mlx.engine.background import Worker
from vllm_mlx.engine.disk_codec import KVCodec
from vllm_mlx.engine.disk_folder import BlockFolder
from vllm_mlx.engine.disk_tier import DiskTier, TierOptions
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.invariance import Invariance
from vllm_mlx.engine.kv_cache import Quantization
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.request import Prompt, Request, SamplingParams
from vllm_mlx.engine.runner import ModelRunner
from vllm_mlx.engine.scheduler import FixedChunk, Limits, Scheduler
from vllm_mlx.engine.speculative import Speculator
from vllm_mlx.engine.step import EngineStatus, FinishReason, TokenEvent

BLOCK = 16


@dataclass
class Answer:
    tokens: list[int] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def last(self) -> TokenEvent:
        return self.events[-1]

    @property
    def reason(self) -> FinishReason | None:
        return self.last.finish_reason


class EngineHarness:
    """`ask` submits, `step` turns, `answers` collects by request id."""

    def __init__(
        self,
        model: Any,
        *,
        max_rows: int = 8,
        chunk: int = 32,
        kv_budget_bytes: int = 1 << 30,
        prefix_bytes: int = 1 << 28,
        checkpoint_interval: int = 64,
        slack_bytes: int = 0,
        quantization: Quantization | None = None,
        disk: Path | None = None,
        disk_min_tokens: int = 1024,
        is_invariant: bool = False,
        invariance: Invariance | None = None,
        speculator: Speculator | None = None,
    ) -> None:
        self.runner = ModelRunner(
            model,
            quantization=quantization,
            checkpoint_step=BLOCK if prefix_bytes else 0,
            slack_bytes=slack_bytes,
            is_invariant=is_invariant,
            seed=0,
            speculator=speculator,
        )
        if invariance is not None:
            self.runner.invariance = invariance
            self.runner.is_batched = self.runner.is_batched and invariance.num_rows != 1
        self.cache = PrefixCache(
            block_size=BLOCK, budget_bytes=prefix_bytes, needs_checkpoint=self.runner.needs_checkpoint
        )
        self.limits = Limits(max_rows, kv_budget_bytes)
        self.tier = None
        if disk is not None:
            self.tier = DiskTier(
                self.cache,
                BlockFolder(disk, limit_bytes=1 << 30),
                KVCodec(),
                TierOptions(model.profile.fingerprint, 1 << 30, disk_min_tokens, grain=64),
                writer=Worker("disk writer"),
                reader=Worker("disk reader"),
            )
            while self.tier.jobs.fault == "not open yet":
                self.tier.jobs.wait(0.1)
                self.tier.poll(0)
        self.scheduler = Scheduler(
            self.runner,
            self.cache if model.profile.shares_prefixes else None,
            self.limits,
            max_tokens_per_step=256,
            chunk_sizer=FixedChunk(chunk),
            block_size=BLOCK,
            checkpoint_interval=checkpoint_interval,
            atomic_spans=model.atomic_spans,
            tier=self.tier,
            grid=self.runner.invariance.grid,
            keeps_answers=not self.runner.invariance.is_promised,
            most_rows=self.runner.invariance.most_rows if model.profile.interleaves else 1,
            max_draft=self.runner.speculator.max_draft if self.runner.speculator is not None else 0,
        )
        self.answers: dict[str, Answer] = {}
        self.statuses: list[EngineStatus] = []
        self.engine = Engine(self.scheduler, self.runner, self._publish)
        if speculator is not None:
            self.engine.on_finished.append(speculator.remember)

    def ask(
        self, prompt: Prompt | Sequence[int], *, id: str | None = None, max_tokens: int = 12, **options: Any
    ) -> str:
        if not isinstance(prompt, Prompt):
            prompt = Prompt(tuple(prompt), boundaries=options.pop("boundaries", ()))
        request = Request(id or f"r{len(self.answers)}", prompt, max_tokens, **options)
        self.answers[request.id] = Answer()
        self.engine.submit(request)
        return request.id

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine.step()

    def stop(self) -> None:
        """As at the end of a server: the disk has it all."""
        assert self.tier is not None
        self.tier.stop()
        assert self.tier.join(60), "the disk cache was not written to its end"

    def run(self) -> None:
        """Until nothing is left to do."""
        turns = 0
        while self.engine.has_work:
            self.engine.step()
            turns += 1
            assert turns < 5000, "the engine does not come to an end"

    def lone(self, prompt: Prompt | Sequence[int], **options: Any) -> list[int]:
        request_id = self.ask(prompt, **options)
        self.run()
        return self.answers[request_id].tokens

    def _publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        self.statuses.append(status)
        for event in events:
            answer = self.answers[event.request_id]
            answer.tokens += event.token_ids
            answer.events.append(event)


def sampled(**params: Any) -> SamplingParams:
    return SamplingParams(**params)
