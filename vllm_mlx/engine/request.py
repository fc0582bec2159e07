"""What the engine is asked to do: frozen values, made by `generation`, read by the engine. No text, no MLX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from ..models.span import MediaSpan as MediaSpan
from ..models.span import VideoFrames as VideoFrames
from .markers import Marker


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids with their media.

    `cache_key` has the length of `token_ids`; placeholders are replaced by negative numbers derived from the media's
    content hash and the index in the span, so that equal images share prefixes and different ones never meet.
    `boundaries` are positions (ends of messages) where a whole-state checkpoint is worth keeping.
    """

    token_ids: tuple[int, ...]
    media: tuple[MediaSpan, ...] = ()
    cache_key: tuple[int, ...] = ()
    boundaries: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise ValueError("a prompt has at least one token")
        if not self.cache_key:
            object.__setattr__(self, "cache_key", make_cache_key(self.token_ids, self.media))
        if len(self.cache_key) != len(self.token_ids):
            raise ValueError("cache key and token ids differ in length")

    def __len__(self) -> int:
        return len(self.token_ids)


def make_cache_key(token_ids: tuple[int, ...], media: tuple[MediaSpan, ...]) -> tuple[int, ...]:
    """Token ids with each media position replaced by a negative number made of content hash and index (int64 range)."""
    if not media:
        return token_ids
    key = list(token_ids)
    for span in media:
        base = int.from_bytes(span.content_hash[:7], "little")
        for i in range(span.length):
            key[span.start + i] = -1 - ((base + i * 0x9E3779B97F4A7C15) & ((1 << 62) - 1))
    return tuple(key)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one row's next token is chosen. Defaults mean "off"; temperature 0 is greedy.

    `frequency_penalty` and `presence_penalty` are OpenAI's additive ones, over completion tokens;
    `repetition_penalty` is the multiplicative one of Keskar et al. (2019), over prompt and completion.
    `num_logprobs`: None for no logprobs, else how many alternatives beside the chosen token's own.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    min_tokens: int = 0
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


class Constraint(Protocol):
    """Grammar state of one sequence; used on the MLX thread only."""

    def allowed(self) -> np.ndarray | None:
        """Bitmask uint32 [ceil(vocab / 32)] of the tokens that may come next; None when everything may."""
        ...

    def accept(self, token_id: int) -> None:
        """Advance by a sampled token."""
        ...

    def rollback(self, num_tokens: int) -> None:
        """Take back the last accepted tokens (drafts that were not kept)."""
        ...

    @property
    def is_finished(self) -> bool:
        """Nothing but a stop token may follow."""
        ...

    @property
    def failure(self) -> str | None:
        """A sentence when the grammar cannot go on; the row is then ended with it."""
        ...


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """Cap on reasoning tokens, kept by forcing the end marker.

    `starts_open`: the prompt already opened the reasoning. `forced_ids`, which hold the end marker, are what the engine
    writes when `max_tokens` reasoning tokens were generated without it.
    """

    max_tokens: int
    start: Marker
    end: Marker
    forced_ids: tuple[int, ...]
    starts_open: bool = False


INTERACTIVE, BACKGROUND = 0, 100
"""Priorities: lower is served first."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to generate.

    `namespace` keeps prefix caches of different keys (and adapters) apart. `deadline` is a `time.monotonic()` value.
    `priority`: lower is served first, 0 is interactive. `client` is who asks, for fairness among callers.
    `make_constraint` builds this sequence's own grammar state; it is called once, on the MLX thread.
    `adapter`: the key of a LoRA adapter in the model's bank, empty for none.
    `skips_prefix_cache`: take nothing from the prefix cache and leave nothing in it.
    """

    id: str
    prompt: Prompt
    max_tokens: int
    sampling: SamplingParams = SamplingParams()
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    deadline: float | None = None
    priority: int = 0
    client: str = ""
    namespace: str = ""
    make_constraint: Callable[[], Constraint] | None = None
    thinking: ThinkingBudget | None = None
    repetition_policy: str = "off"
    num_prompt_logprobs: int | None = None
    skips_prefix_cache: bool = False
    adapter: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)
