"""Ranks that follow hold the same rows as the one that leads, after every step of random traffic on the fake model."""

from __future__ import annotations

import gc
import pickle
import random
from collections.abc import Sequence

import pytest

from tests.simulation.fake_model import FakeRunner, lone_run
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.prefix_cache import PrefixCache
from vllm_mlx.engine.ranks import Follower, Forget, LeadRunner, Message, Verified
from vllm_mlx.engine.request import Prompt, Request
from vllm_mlx.engine.scheduler import FixedChunk, Limits, Scheduler
from vllm_mlx.engine.step import EngineStatus, TokenEvent

BLOCK = 4


class World:
    """Rank 0 with an engine, and one rank that follows; what passes between them is pickled, as it really is."""

    def __init__(self, seed: int) -> None:
        r = self.random = random.Random(seed)
        self.is_hybrid = r.random() < 0.5
        step = r.choice([0, BLOCK])
        self.max_draft = r.choice([0, 1, 6])
        self.lead = FakeRunner(is_hybrid=self.is_hybrid, checkpoint_step=step, draft=self.guess)
        self.other = FakeRunner(is_hybrid=self.is_hybrid, checkpoint_step=step, samples=False)
        self.follower = Follower(self.other)
        self.lost: list[str] = []
        self.num_forgotten = 0
        self.runner = LeadRunner(self.lead, self.send, self.lost.append)
        budget = r.choice([100, 800, 20_000])
        self.cache = PrefixCache(block_size=BLOCK, budget_bytes=budget, needs_checkpoint=self.is_hybrid)
        self.scheduler = Scheduler(
            self.runner,
            self.cache,
            Limits(r.choice([1, 3, 8]), r.choice([400, 3000, 20_000])),
            max_tokens_per_step=r.choice([8, 64]),
            chunk_sizer=FixedChunk(r.choice([BLOCK, 16])),
            block_size=BLOCK,
            checkpoint_interval=r.choice([0, 8]),
            max_draft=self.max_draft,
        )
        self.tokens: dict[str, list[int]] = {}
        self.requests: dict[str, Request] = {}
        self.engine = Engine(self.scheduler, self.runner, self.publish)

    def guess(self, true_tokens: list[int], limit: int) -> list[int]:
        """What will come, as far as luck goes, and then something else."""
        r = self.random
        right = true_tokens[: r.randrange(limit + 1)]
        return right + [(t + 1) % 200 for t in true_tokens[len(right) : limit][: r.randrange(2)]]

    def send(self, messages: Sequence[Message]) -> None:
        self.num_forgotten += sum(isinstance(message, Forget) for message in messages)
        self.follower.follow(pickle.loads(pickle.dumps(list(messages))))

    def publish(self, events: list[TokenEvent], status: EngineStatus) -> None:
        for event in events:
            self.tokens[event.request_id] += event.token_ids

    def ask(self) -> None:
        stem = [self.random.choice([1, 2, 3]) for _ in range(8)]
        prompt = stem[: self.random.choice([0, 4, 8])] + [self.random.randrange(200) for _ in range(5)]
        request = Request(f"r{len(self.requests)}", Prompt(tuple(prompt)), self.random.choice([1, 5, 12]))
        self.requests[request.id], self.tokens[request.id] = request, []
        self.engine.submit(request)

    def step(self) -> None:
        self.engine.step()
        verified = [message.kept for message in self.runner._unsent if isinstance(message, Verified)]
        unsaid = {request_id: num for kept in verified for request_id, num in kept.items()}
        for request_id, row in self.other.rows.items():
            if request_id in self.lead.rows:
                lead, unknown = self.lead.rows[request_id], unsaid.get(request_id, 0)
                assert row.keys == lead.keys[: len(lead.keys) - unknown] and (unknown or row.state == lead.state)


@pytest.mark.parametrize("block", range(8))
def test_every_rank_holds_the_same_rows_and_forgets_what_is_forgotten(block: int) -> None:
    forgotten = kept_drafts = 0
    for seed in range(block * 25, block * 25 + 25):
        world = World(seed)
        for _ in range(60):
            if world.random.random() < 0.4 and len(world.requests) < 12:
                world.ask()
            if world.requests and world.random.random() < 0.05:
                world.engine.cancel(world.random.choice(list(world.requests)))
            world.step()
        while world.engine.has_work:
            world.step()
        for request in world.requests.values():
            expected = lone_run(request, is_hybrid=world.is_hybrid)
            assert world.tokens[request.id] == expected[: len(world.tokens[request.id])]
        world.cache.clear()
        gc.collect()
        world.ask()  # what is still unsaid goes with the next step
        while world.engine.has_work:
            world.step()
        held = sum(n.segment is not None for n in world.cache.nodes()) + sum(
            n.checkpoint is not None for n in world.cache.nodes()
        )
        kept = len(world.follower._kept) - len(world.runner.forgotten) - sum(
            len(m.handles) for m in world.runner._unsent if isinstance(m, Forget)
        )
        assert kept <= held + len(world.runner._unsent), "a follower keeps what rank 0 has forgotten"
        forgotten += world.num_forgotten
        kept_drafts += world.lead.num_kept
    assert forgotten and kept_drafts, "nothing was forgotten or guessed, so nothing was tested"


def test_steps_do_not_overlap_and_a_failed_one_is_told() -> None:
    world = World(1)
    world.lead._fault = lambda where: 1 // 0 if where == "collect" else None
    world.ask()
    for _ in range(10):
        world.engine.step()
    assert world.lost and "ZeroDivisionError" in world.lost[0]
