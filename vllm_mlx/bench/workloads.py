"""What is asked in a benchmark: conversations made from a seed, the same for every target, new in every round. Pure."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_mlx.bench.model import make_text, make_vocabulary

Message = dict[str, str]

WORKLOADS = ("short", "long", "shared", "multi-turn", "mixed", "structured", "again")
# Words of our invented text are about one and a half tokens of the benchmark model's tokenizer.
TOKENS_PER_WORD = 1.45
NUM_TURNS = 4
# An answer that can be of any length, so that all are equally long.
LETTERS = {
    "type": "json_schema",
    "json_schema": {"name": "words", "schema": {"type": "array", "items": {"type": "string"}, "minItems": 4000}},
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """`opening`, then the answer, then the first of `followups`, and so on. Each answer is `max_tokens` long.

    `body` are fields of the request beside the messages; the engine alone knows nothing of them.
    """

    opening: tuple[Message, ...]
    max_tokens: int
    followups: tuple[str, ...] = ()
    body: Mapping[str, Any] = field(default_factory=dict)


class Writer:
    """Text of a wanted length in tokens, from a seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._words = make_vocabulary()
        self._random.shuffle(self._words)

    def text(self, num_tokens: int) -> str:
        return make_text(self._random, self._words, max(1, round(num_tokens / TOKENS_PER_WORD)))

    def between(self, low: int, high: int) -> int:
        return self._random.randint(low, high)


def make(workload: str, num_requests: int, *, seed: int, max_tokens: int, prompt_tokens: int = 2000
         ) -> list[Conversation]:
    """`num_requests` conversations of a workload named in WORKLOADS."""
    writer = Writer(seed)
    shared = writer.text(prompt_tokens)

    def short() -> Conversation:
        return Conversation((_user(writer.text(24)),), max_tokens)

    def long() -> Conversation:
        return Conversation((_user(writer.text(prompt_tokens)),), max_tokens)

    def same_beginning() -> Conversation:
        return Conversation((_system(shared), _user(writer.text(32))), max_tokens)

    def several_turns() -> Conversation:
        opening = (_system(writer.text(prompt_tokens // 4)), _user(writer.text(32)))
        return Conversation(opening, max_tokens, tuple(writer.text(32) for _ in range(NUM_TURNS - 1)))

    def any_kind() -> Conversation:
        kind = writer.between(0, 9)
        if kind < 5:
            return Conversation((_user(writer.text(writer.between(8, 200))),), max(1, max_tokens // 2))
        if kind < 7:
            return Conversation((_user(writer.text(writer.between(prompt_tokens // 4, prompt_tokens))),), max_tokens)
        return same_beginning()

    def structured() -> Conversation:
        return Conversation((_user(writer.text(24)),), max_tokens, body={"response_format": LETTERS})

    kinds: dict[str, Callable[[], Conversation]] = {
        "short": short, "long": long, "shared": same_beginning, "multi-turn": several_turns, "mixed": any_kind,
        "structured": structured, "again": short,
    }  # fmt: skip
    if workload == "again":  # as a retry, or a file written anew: each request twice, one after the other
        return [one for _ in range((num_requests + 1) // 2) for one in [short()] * 2][:num_requests]
    return [kinds[workload]() for _ in range(num_requests)]


def repeated_with_new_line(seed: int, *, max_tokens: int, prompt_tokens: int = 2000) -> tuple[Conversation, ...]:
    """Two prompts that differ in their last line only."""
    writer = Writer(seed)
    text = writer.text(prompt_tokens)
    return tuple(Conversation((_user(f"{text}\n{writer.text(16)}"),), max_tokens) for _ in range(2))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _system(text: str) -> Message:
    return {"role": "system", "content": text}
