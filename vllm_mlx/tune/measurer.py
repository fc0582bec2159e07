"""Measures knobs on a loaded model: engines stepped in a loop, without threads, HTTP or text. The thread of MLX.

Prompts are random tokens, so that nothing is found in a cache and nothing is said about quality; answers are greedy and
have their full length. How long the work is follows from the machine: a prompt takes some seconds at most.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Sequence

from vllm_mlx.engine.assembly import EngineOptions, build_engine
from vllm_mlx.engine.engine import Engine
from vllm_mlx.engine.request import Prompt, Request
from vllm_mlx.models.base import LanguageModel
from vllm_mlx.tune.search import Knobs

LONGEST_PROMPT, SHORTEST_PROMPT = 4096, 64
SHORT_PROMPT = 16
LONG_ENOUGH_S = 4.0
# Nobody waits so long for a token; more rows are not tried.
SLOWEST_STEP_S = 2.0
SETTLING_STEPS, TIMED_STEPS = 4, 8
NO_END = 1 << 20


class EngineMeasurer:
    """`options`: everything but the knobs. `answer_tokens`: length of answers where whole requests are measured."""

    def __init__(self, model: LanguageModel, options: EngineOptions, *, answer_tokens: int = 48,
                 longest_prompt: int = LONGEST_PROMPT, seed: int = 1) -> None:
        self._model = model
        self._options = options
        self._answer_tokens = answer_tokens
        self._rng = random.Random(seed)
        self._count = 0
        # Guessing learns while it runs, from answers and from what steps cost: these engines live on.
        self._guessing: dict[str, Engine] = {}
        # Not the placeholders of pictures, which stand for something.
        profile = model.profile
        self._words = sorted(set(range(profile.vocab_size)) - set(profile.media_token_ids.values()))
        self._context = model.profile.context_tokens or LONGEST_PROMPT
        self._prompt_tokens = self._affordable(min(longest_prompt, self._context - 8))

    @property
    def prompt_tokens(self) -> int:
        """Length of the long prompt."""
        return self._prompt_tokens

    def prefill_s(self, knobs: Knobs) -> float:
        return self._run(self._engine(knobs), [self._prompt(self._prompt_tokens)], 1)

    def decode_rates(self, rows: Sequence[int]) -> dict[int, float]:
        room = self._options.memory_bytes
        engine = self._engine(Knobs(512, max(rows), "off"))
        rates: dict[int, float] = {}
        for num_rows in rows:
            while len(engine.scheduler.running) < num_rows:
                for _ in range(num_rows - len(engine.scheduler.running)):
                    self._submit(engine, self._prompt(SHORT_PROMPT), NO_END)
                while engine.scheduler.waiting or any(s.is_prefilling for s in engine.scheduler.running.values()):
                    engine.step()
            for _ in range(SETTLING_STEPS):
                engine.step()
            started = time.perf_counter()
            for _ in range(TIMED_STEPS):
                engine.step()
            step_s = (time.perf_counter() - started) / TIMED_STEPS
            rates[num_rows] = num_rows / step_s
            if step_s > SLOWEST_STEP_S or 2 * engine.scheduler.kv_bytes > room:
                break
        engine.cancel_all()
        return rates

    def copying_s(self, knobs: Knobs, num_rows: int) -> float:
        engine = self._guesser(knobs)
        prompts = [self._prompt(SHORT_PROMPT) for _ in range(num_rows)]
        self._run(engine, prompts, self._answer_tokens)
        return self._run(engine, prompts, self._answer_tokens)

    def writing_s(self, knobs: Knobs, num_rows: int) -> float:
        prompts = [self._prompt(SHORT_PROMPT) for _ in range(num_rows)]
        return self._run(self._guesser(knobs), prompts, self._answer_tokens)

    def crowd_s(self, knobs: Knobs, num_requests: int) -> float:
        prompts = [self._prompt(SHORT_PROMPT) for _ in range(num_requests)]
        return self._run(self._engine(knobs), prompts, self._answer_tokens // 2)

    # ── engines ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _engine(self, knobs: Knobs) -> Engine:
        options = dataclasses.replace(
            self._options, prefill_step=knobs.prefill_step_size, max_rows=knobs.max_num_seqs,
            speculation=knobs.speculation, prefix_cache_bytes=0, disk=None,
        )  # fmt: skip
        return build_engine(self._model, options, lambda events, status: None)

    def _guesser(self, knobs: Knobs) -> Engine:
        if knobs.speculation not in self._guessing:
            engine = self._guessing[knobs.speculation] = self._engine(knobs)
            self._run(engine, [self._prompt(SHORT_PROMPT)], 8)
        return self._guessing[knobs.speculation]

    def _run(self, engine: Engine, prompts: Sequence[tuple[int, ...]], num_tokens: int) -> float:
        """Seconds until all requests have ended."""
        started = time.perf_counter()
        for prompt in prompts:
            self._submit(engine, prompt, num_tokens)
        while engine.has_work:
            engine.step()
        return time.perf_counter() - started

    def _submit(self, engine: Engine, prompt: tuple[int, ...], num_tokens: int) -> None:
        self._count += 1
        engine.submit(Request(f"tune-{self._count}", Prompt(prompt), num_tokens))

    def _prompt(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.choice(self._words) for _ in range(num_tokens))

    def _affordable(self, longest: int) -> int:
        """Tokens of a prompt that takes no longer than LONG_ENOUGH_S on this machine, by doubling."""
        knobs = Knobs(512, 1, "off")
        num_tokens = min(SHORTEST_PROMPT, longest)
        self._run(self._engine(knobs), [self._prompt(num_tokens)], 1)  # kernels are compiled
        while 2 * num_tokens <= longest:
            seconds = self._run(self._engine(knobs), [self._prompt(num_tokens)], 1)
            if 2 * seconds > LONG_ENOUGH_S:
                break
            num_tokens *= 2
        return num_tokens
