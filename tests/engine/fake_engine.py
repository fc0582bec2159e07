"""An engine on the hashing fake model of the simulation, with every event and status it published at hand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.fake_model import FakeLaunched, FakeRunner, lone_run
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.request import Prompt, Request
from vllm_mlx.engine.scheduler import FixedChunk, Limits, Scheduler
from vllm_mlx.engine.sequence import Sequence as EngineSequence
from vllm_mlx.engine.step import EngineStatus, FinishReason, Sampled, StepPlan, StepResult, TokenEvent

BLOCK = 4


class WobblyRunner(FakeRunner):
    """While `wobbles`, tokens from the third on are off by one in any step that computes more than one row."""

    wobbles = False

    def launch(
        self,
        plan: StepPlan,
        sequences: Mapping[str, EngineSequence],
        drafts: tuple[tuple[int, ...], ...] | None = None,
    ) -> FakeLaunched:
        launched = super().launch(plan, sequences, drafts)
        if not self.wobbles or len(plan.decode) < 2:
            return launched
        sampled = []
        for item in launched.result.sampled:
            token = item.token_ids[0]
            if sequences[item.request_id].num_sampled > 2:
                token = self.rows[item.request_id].device_token = (token + 1) % 211
            sampled.append(Sampled(item.request_id, (token,)))
        return FakeLaunched(plan, StepResult(tuple(sampled)), launched.allows_overlap)


@dataclass
class Published:
    events: list[TokenEvent] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [t for event in self.events for t in event.token_ids]

    @property
    def finals(self) -> list[TokenEvent]:
        return [event for event in self.events if event.finish_reason is not None]

    @property
    def reason(self) -> FinishReason | None:
        return self.finals[0].finish_reason if self.finals else None


class FakeEngine:
    """`ask` submits, `step` turns, `published[id]` is what came out."""

    def __init__(
        self,
        *,
        max_rows: int = 8,
        kv_budget_bytes: int = 100_000,
        prefix_bytes: int | None = 100_000,
        max_tokens_per_step: int = 64,
        chunk: int = 16,
        is_hybrid: bool = False,
        fault: Callable[[str], None] = lambda where: None,
        **scheduler_options: Any,
    ) -> None:
        self.now = 0.0
        self.is_hybrid = is_hybrid
        self.runner = WobblyRunner(is_hybrid=is_hybrid, fault=fault)
        self.cache = None
        if prefix_bytes is not None:
            self.cache = PrefixCache(block_size=BLOCK, budget_bytes=prefix_bytes, needs_checkpoint=is_hybrid)
        self.limits = Limits(max_rows, kv_budget_bytes)
        self.scheduler = Scheduler(
            self.runner,
            self.cache,
            self.limits,
            max_tokens_per_step=max_tokens_per_step,
            chunk_sizer=FixedChunk(chunk),
            block_size=BLOCK,
            **{"checkpoint_interval": 0, **scheduler_options},
        )
        self.published: dict[str, Published] = {}
        self.statuses: list[EngineStatus] = []
        self.requests: dict[str, Request] = {}
        self.engine = Engine(self.scheduler, self.runner, self._publish, clock=lambda: self.now)

    def ask(self, request_id: str, prompt: Sequence[int] | Prompt = range(10), max_tokens: int = 5, **more: Any) -> str:
        prompt = prompt if isinstance(prompt, Prompt) else Prompt(tuple(prompt))
        request = Request(request_id, prompt, max_tokens, **more)
        self.requests[request_id] = request
        self.engine.submit(request)
        return request_id

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.now += 1
            self.engine.step()

    def run(self, limit: int = 1000) -> None:
        """Until there is nothing to do."""
        for _ in range(limit):
            if not self.engine.has_work:
                return
            self.step()
        raise AssertionError("the engine does not come to an end")

    def lone(self, request_id: str) -> list[int]:
        """What the request's answer must be."""
        return lone_run(self.requests[request_id], is_hybrid=self.is_hybrid)

    def is_clean(self) -> bool:
        """No row, no reserved byte, no lock is left."""
        locks = sum(node.num_locks for node in self.cache.nodes()) if self.cache else 0
        return not (self.runner.rows or self.scheduler.kv_bytes or locks)

    def _publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        self.statuses.append(status)
        for event in events:
            self.published.setdefault(event.request_id, Published()).events.append(event)
