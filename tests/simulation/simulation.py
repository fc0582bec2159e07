"""Random traffic on the real engine, scheduler, prefix cache and disk tier with a fake model, disk and clock; one seed.

After every step the invariants of `Simulation.check` must hold; at the end every request has ended exactly once, its
tokens are those of the lone run, and all locks, rows and reserved bytes are back at zero.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.simulation.fake_disk import FakeBackground, FakeCodec, FakeFolder
from tests.simulation.fake_model import BYTES_PER_TOKEN, VOCAB, FakeRunner, lone_run
from vllm_mlx.engine.disk_tier import DiskTier, TierOptions
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.request import MediaSpan, Prompt, Request, SamplingParams
from vllm_mlx.engine.scheduler import FixedChunk, Limits, Scheduler
from vllm_mlx.engine.step import EngineStatus, FinishReason, TokenEvent

BLOCK = 4


@dataclass
class Outcome:
    request: Request
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason | None = None
    detail: str | None = None
    num_cached: int = 0


class Simulation:
    """One seed's world. `run()` raises AssertionError where something does not hold."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        r = self.random
        self.now = 0.0
        self.is_hybrid = r.random() < 0.4
        self.atomic_spans = r.random() < 0.2
        self.fault_rate = r.choice([0, 0, 0, 0.02])
        self.keeps_answers = r.random() < 0.8
        self.runner = FakeRunner(
            is_hybrid=self.is_hybrid,
            checkpoint_step=r.choice([0, BLOCK]),
            fault=self._fault,
            needs_host=self._needs_host,
            draft=self._guess,
            decodes_answers=not self.keeps_answers,
        )
        budget = r.choice([400, 900, 3000, 20000])
        self.cache = None
        if r.random() < 0.85:
            self.cache = PrefixCache(
                block_size=BLOCK,
                budget_bytes=r.choice([0, 150, 800, 20000]),
                needs_checkpoint=self.is_hybrid,
                min_checkpoint_gap=r.choice([0, 8, 500]),
            )
        self.writer, self.reader = FakeBackground(), FakeBackground()
        self.folder = FakeFolder(
            r, limit_bytes=r.choice([200, 2000, 50_000]), fault_rate=r.choice([0, 0, 0.02, 0.2])
        )
        self.has_disk = self.cache is not None and r.random() < 0.5
        self.num_restarts = r.choice([0, 0, 1]) if self.has_disk else 0
        self.tier_options = TierOptions(
            "model",
            self.folder.limit_bytes,
            min_tokens=r.choice([1, 8, 100]),
            grain=r.choice([4, 8, 12, 64]),
            min_gain=r.choice([1, 4, 8]),
            max_pending_bytes=r.choice([100, 10_000]),
            settle_s=r.choice([0, 25]),
            max_restores=r.choice([1, 2, 9]),
            read_bytes_per_s=1e9,
            write_bytes_per_s=1e9,
        )
        self.prefix_bytes = self.cache.budget_bytes if self.cache else 0
        self.min_checkpoint_gap = self.cache.min_checkpoint_gap if self.cache else 0
        self.limits = Limits(max_rows=r.choice([1, 2, 4, 8]), kv_budget_bytes=budget)
        self.max_tokens_per_step = r.choice([6, 12, 64])
        self.chunk = r.choice([BLOCK, 2 * BLOCK, 64])
        self.seconds_per_token = r.choice([None, 1e-12, 1.0])
        self.expected_completion = r.choice([1, 8, 256])
        self.max_draft = r.choice([0, 0, 1, 6]) if self.keeps_answers else 0
        self.grid = r.choice([0, 2 * BLOCK]) if not self.keeps_answers else 0
        self.checkpoint_interval = r.choice([0, 8, 16])
        self._start()
        self.outcomes: dict[str, Outcome] = {}
        self.unhealthy = False
        self.stems = [self._tokens(r.randint(1, 30)) for _ in range(3)]

    def _start(self) -> None:
        """An engine; after a restart, a new one that shares nothing with the last but the disk."""
        if self.has_disk:
            self.cache = PrefixCache(
                block_size=BLOCK,
                budget_bytes=self.prefix_bytes,
                needs_checkpoint=self.is_hybrid,
                min_checkpoint_gap=self.min_checkpoint_gap,
            )
            self.tier = DiskTier(
                self.cache, self.folder, FakeCodec(), self.tier_options,
                writer=self.writer, reader=self.reader, clock=lambda: self.now * 10,
            )  # fmt: skip
        self.scheduler = Scheduler(
            self.runner,
            self.cache,
            self.limits,
            max_tokens_per_step=self.max_tokens_per_step,
            chunk_sizer=FixedChunk(self.chunk, self.seconds_per_token),
            block_size=BLOCK,
            checkpoint_interval=self.checkpoint_interval,
            atomic_spans=self.atomic_spans,
            expected_completion=self.expected_completion,
            tier=self.tier if self.has_disk else None,
            max_draft=self.max_draft,
            keeps_answers=self.keeps_answers,
            grid=self.grid,
        )
        self.engine = Engine(self.scheduler, self.runner, self._publish, clock=lambda: self.now)

    def _restart(self) -> None:
        """Politely, or as after kill -9: what the background had not done is lost."""
        self.engine.cancel_all()
        self.check_end()
        if self.random.random() < 0.5:
            self.tier.stop()
            self.tier.join(1.0)
        self.writer.jobs.clear()
        self.reader.jobs.clear()
        self.folder.close()
        self._start()

    # ── the world ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        to_come = self.random.randint(1, 9)
        idle_steps = 0
        while to_come or self.engine.has_work:
            if to_come and self.random.random() < 0.4:
                to_come -= 1
                self._arrive(len(self.outcomes))
            self._disturb()
            if self.num_restarts and self.random.random() < 0.05:
                self.num_restarts -= 1
                self._restart()
            before = self.runner.num_computed, sum(o.reason is not None for o in self.outcomes.values())
            self.now += 1
            self.engine.step()
            self.check()
            after = self.runner.num_computed, sum(o.reason is not None for o in self.outcomes.values())
            idle_steps = idle_steps + 1 if before == after else 0
            assert idle_steps < 40 or to_come, "no progress: the engine is stuck"
            assert self.now < 5000, "a request did not end in a bounded number of steps"
        self.check_end()

    def _arrive(self, number: int) -> None:
        r = self.random
        tokens = r.choice(self.stems)[: r.randint(1, 30)] + self._tokens(r.randint(0, 12))
        media: tuple[MediaSpan, ...] = ()
        if len(tokens) > 6 and r.random() < 0.25:
            start = r.randrange(0, len(tokens) - 4)
            length = r.randint(1, 3)
            media = (MediaSpan(start, length, "image", bytes([r.randrange(3)] * 8), {}),)
            tokens[start : start + length] = [0] * length
        boundaries = tuple(sorted(r.sample(range(len(tokens)), min(2, len(tokens)))))
        request = Request(
            id=f"r{number}",
            prompt=Prompt(tuple(tokens), media, boundaries=boundaries),
            max_tokens=r.choice([1, 2, 5, 20]),
            sampling=SamplingParams(seed=r.choice([0, 0, 1]), min_tokens=r.choice([0, 0, 3])),
            stop_token_ids=frozenset(r.sample(range(VOCAB), r.choice([0, 5, 40]))),
            deadline=self.now + r.randint(1, 60) if r.random() < 0.1 else None,
            priority=r.choice([0, 0, 0, 1, 10]),
            client=r.choice(["", "", "a", "b"]),
            namespace=r.choice(["", "", "other"]),
        )
        self.outcomes[request.id] = Outcome(request)
        self.engine.submit(request)

    def _disturb(self) -> None:
        r = self.random
        if self.has_disk:
            self.writer.run_some(r.choice([0, 0, 1, 5]))
            self.reader.run_some(r.choice([0, 1, 1, 5]))
            if r.random() < 0.2:
                self.engine.idle()
        if r.random() < 0.05 and self.outcomes:
            self.engine.cancel(r.choice(list(self.outcomes)))
        if r.random() < 0.03:
            self.limits.max_rows = r.choice([1, 2, 4, 8])
        if r.random() < 0.03:
            self.limits.kv_budget_bytes = r.choice([500, 900, 3000, 20000])
        if self.cache and r.random() < 0.02:
            self.cache.set_budget(r.choice([0, 150, 800, 20000]))
        if self.cache and r.random() < 0.02:
            self.cache.clear()

    def _fault(self, where: str) -> None:
        if self.random.random() < self.fault_rate:
            raise RuntimeError(f"injected at {where}")

    def _guess(self, truth: list[int], limit: int) -> list[int]:
        """A draft that is right as far as it goes, or has an error somewhere."""
        draft = truth[: self.random.randint(0, limit)]
        if draft and self.random.random() < 0.5:
            draft[self.random.randrange(len(draft))] = self.random.randrange(VOCAB)
        return draft

    def _needs_host(self, request: Request) -> bool:
        return request.max_tokens == 5

    def _tokens(self, count: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(count)]

    def _publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        self.unhealthy = not status.is_healthy
        for event in events:
            outcome = self.outcomes[event.request_id]
            assert outcome.reason is None, f"an event for {event.request_id} after its final one"
            outcome.tokens += event.token_ids
            outcome.reason, outcome.detail = event.finish_reason, event.detail
            if event.usage:
                outcome.num_cached = event.usage.num_cached_tokens
                assert event.usage.num_completion_tokens == len(outcome.tokens)

    # ── what must hold ──────────────────────────────────────────────────────────────────────────────────────────

    def check(self) -> None:
        """Invariants between steps."""
        scheduler = self.scheduler
        assert set(self.runner.rows) == set(scheduler.running), "rows and running sequences differ"
        for sequence in scheduler.running.values():
            row = self.runner.rows[sequence.id]
            assert len(row.keys) == sequence.num_computed, "progress and KV differ"
            assert sequence.num_pending <= 1
            assert sequence.num_sampled <= sequence.request.max_tokens
        held = sum(len(row.keys) for row in self.runner.rows.values()) * BYTES_PER_TOKEN
        assert held <= scheduler.kv_bytes, "rows hold more than was reserved"
        in_flight = self.engine._in_flight
        if in_flight is not None and not self.atomic_spans:
            assert in_flight.plan.num_tokens <= max(self.max_tokens_per_step, 8 + BLOCK), "token budget passed"
        if self.cache is not None:
            self.cache.check()
            locks = sum(len(list(s.lease.held())) for s in scheduler.running.values() if s.lease)
            if self.has_disk:
                locks += sum(len(list(p.pin.node.path())) for p in self.tier.restores.under_way if p.pin)
                in_flight_bytes = sum(p.nbytes for p in self.tier.jobs._in_flight.values())
                assert in_flight_bytes <= self.tier.jobs.pending_bytes, "bytes on their way to disk are not conserved"
            assert locks == sum(node.num_locks for node in self.cache.nodes()), "a lock without an owner"

    def check_end(self) -> None:
        assert not self.runner.rows and not self.scheduler.running and not self.scheduler.waiting
        assert self.scheduler.kv_bytes == 0
        if self.has_disk:  # let the background finish
            for _ in range(1000):
                self.writer.run_some(100)
                self.reader.run_some(100)
                if not self.engine.idle() and not self.writer.jobs and not self.reader.jobs:
                    break
            self.tier.poll(1 << 30)
            is_at_rest = not self.tier.restores.under_way and self.tier.jobs.pending_bytes == 0
            assert is_at_rest, "the disk tier does not come to rest"
            self.cache.check()
        if self.cache is not None:
            assert all(node.num_locks == 0 for node in self.cache.nodes())
        for outcome in self.outcomes.values():
            assert outcome.reason is not None, f"{outcome.request.id} never ended"
            expected = lone_run(outcome.request, is_hybrid=self.is_hybrid)
            if outcome.reason is FinishReason.STOP or (outcome.reason is FinishReason.LENGTH and not outcome.detail):
                assert outcome.tokens == expected, f"{outcome.request.id}: {outcome.tokens} is not {expected}"
            else:
                assert outcome.tokens == expected[: len(outcome.tokens)], f"{outcome.request.id}: a wrong beginning"
            if outcome.reason is FinishReason.ERROR:
                assert outcome.detail and (self.fault_rate or "KV cache" in outcome.detail), outcome.detail
