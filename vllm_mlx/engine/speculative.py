"""Drafts: what a row's next tokens may be, guessed on the host, and whether guessing pays. Pure; no MLX, no clock.

The runner asks the `Speculator` before each decode step. A row with a draft computes several tokens in one forward;
those that the row's own sampler would have chosen are kept, so the text is what it would have been (Leviathan et al.
2023; for a guess that is certain of one token, sampling and comparing *is* their rejection rule). Guesses come from

    prompt lookup    the tokens that followed the last few ones before, in prompt or answer (Saxena 2023)
    earlier answers  the same, over the answers of the last finished requests with the same key
    a draft model    `draft_model.py`, or a head that the served model itself has: `mtp_draft.py`

A guess is checked against what the row really does next whether it is used or not, so the rate at which guesses hold is
known before anything is paid for them, and speculation comes back by itself where it begins to pay.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vllm_mlx.engine.sequence import Sequence as Row
from vllm_mlx.engine.step import StepPlan

# Tokens that must agree before what followed them is a guess.
NGRAM = 3
MAX_DRAFT = 16
# A row's rate of held guesses follows the last twenty or so; a new row starts with this.
FOLLOW = 0.08
FIRST_RATE = 0.5
# A draft must promise to save this share of a step, or it is not worth the noise of the estimate.
MARGIN = 0.03
POOL_TOKENS = 32768
MAX_POOLS = 64


class NgramIndex:
    """Where in a growing run of tokens each n-gram last ended. The first tokens, often many, are kept in arrays."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = list(tokens)
        self._later: dict[int, int] = {}
        self._keys = np.zeros(0, dtype=np.int64)
        self._ends = self._keys
        if len(self.tokens) > NGRAM:
            ids = np.asarray(self.tokens, dtype=np.int64)
            keys = ids[: -NGRAM + 1]
            for i in range(1, NGRAM):
                keys = (keys << 21) ^ ids[i : len(ids) - NGRAM + 1 + i]
            keys = keys[:-1]  # the last one has nothing behind it yet
            order = np.argsort(keys, kind="stable")
            self._keys, self._ends = keys[order], order + NGRAM

    def append(self, token: int) -> None:
        if (key := self.last_key()) is not None:
            self._later[key] = len(self.tokens)
        self.tokens.append(token)

    def last_key(self) -> int | None:
        """The n-gram at the end."""
        if len(self.tokens) < NGRAM:
            return None
        key = 0
        for token in self.tokens[-NGRAM:]:
            key = (key << 21) ^ token
        return key

    def find(self, key: int | None) -> int | None:
        """Position of the token that followed this n-gram the last time; None if it was not seen."""
        if key is None:
            return None
        found = self._later.get(key)
        if found is None and self._keys.size:
            place = int(np.searchsorted(self._keys, key, side="right")) - 1
            if place >= 0 and self._keys[place] == key:
                return int(self._ends[place])
        return found


class AnswerPool:
    """The last answers of one namespace, for requests that are asked again or differ little."""

    def __init__(self, max_tokens: int = POOL_TOKENS) -> None:
        self._max_tokens = max_tokens
        self._answers: OrderedDict[int, list[int]] = OrderedDict()
        self._ends: dict[int, tuple[int, int]] = {}
        self._num_tokens = 0
        self._count = 0

    def add(self, tokens: Sequence[int]) -> None:
        tokens = list(tokens[-self._max_tokens :])
        if len(tokens) <= NGRAM:
            return
        self._count += 1
        self._answers[self._count] = tokens
        self._num_tokens += len(tokens)
        for i in range(NGRAM, len(tokens)):
            self._ends[_key(tokens, i)] = self._count, i
        while self._num_tokens > self._max_tokens:
            _, dropped = self._answers.popitem(last=False)
            self._num_tokens -= len(dropped)
        if len(self._ends) > 4 * self._max_tokens:
            self._ends = {k: end for k, end in self._ends.items() if end[0] in self._answers}

    def find(self, key: int | None) -> tuple[list[int], int] | None:
        """An answer and the position in it of what followed this n-gram."""
        if key is None or (end := self._ends.get(key)) is None or end[0] not in self._answers:
            return None
        return self._answers[end[0]], end[1]


def _key(tokens: Sequence[int], end: int) -> int:
    key = 0
    for token in tokens[end - NGRAM : end]:
        key = (key << 21) ^ token
    return key


class Lookup:
    """One row's guess: a place in a text that has agreed with the row so far. `rate`: how often guesses held lately."""

    def __init__(self, tokens: Sequence[int], pool: AnswerPool | None) -> None:
        self._index = NgramIndex(tokens)
        self._pool = pool
        self._guess: tuple[list[int], int] | None = None
        self.rate = FIRST_RATE
        self._search()

    def catch_up(self, tokens: Sequence[int]) -> None:
        """Take the tokens that came since the last call; each is a trial of the guess made for its place."""
        for token in tokens[len(self._index.tokens) :]:
            self._index.append(token)
            if self._guess is not None:
                text, place = self._guess
                holds = text[place] == token
                self.rate += FOLLOW * (holds - self.rate)
                self._guess = (text, place + 1) if holds and place + 1 < len(text) else None
            if self._guess is None:
                self._search()

    def draft(self, limit: int) -> tuple[int, ...]:
        """At most `limit` tokens; a text that ends while it repeats itself is thought to go on repeating."""
        if self._guess is None:
            return ()
        text, place = self._guess
        found = list(text[place : place + limit])
        if text is self._index.tokens:
            period = len(text) - place
            while len(found) < limit:
                found.append(found[len(found) - period])
        return tuple(found)

    def _search(self) -> None:
        key = self._index.last_key()
        place = self._index.find(key)
        if place is not None:
            self._guess = self._index.tokens, place
        elif self._pool is not None:
            self._guess = self._pool.find(key)


class Costs:
    """What a decode step takes by the number of tokens in it: a line through the steps seen lately."""

    def __init__(self, decay: float = 0.98) -> None:
        self._decay = decay
        self._sums = np.zeros(5)  # weight, tokens, seconds, tokens squared, tokens times seconds

    def observe(self, num_tokens: int, seconds: float) -> None:
        expected = self.of(num_tokens)
        if expected is not None:
            seconds = min(seconds, 3 * expected)  # a hiccup of the machine says nothing
        x = np.array([1.0, num_tokens, seconds, num_tokens**2, num_tokens * seconds])
        self._sums = self._decay * self._sums + x

    @property
    def per_token(self) -> float:
        """Seconds that one more token adds to a step. Before steps of different sizes were seen, a tenth of a step of
        one token."""
        n, x, y, xx, xy = self._sums.tolist()
        if n == 0:
            return 0.0
        spread = n * xx - x * x
        guess = 0.1 * (y / n) / max(1.0, 0.9 + 0.1 * x / n)
        if spread < 0.01 * n * n:
            return guess
        return max((n * xy - x * y) / spread, 0.05 * guess)

    def of(self, num_tokens: int) -> float | None:
        """Seconds of a step; None when nothing was seen."""
        n, x, y, _, _ = self._sums.tolist()
        if n == 0:
            return None
        return max(y / n + self.per_token * (num_tokens - x / n), 0.1 * y / n)


def best_length(rate: float, limit: int, step_s: float, per_token_s: float, num_rows: int) -> int:
    """How long a draft saves most time; 0 when none saves any.

    A kept token spares the row its share of a plain step; each drafted one costs `per_token_s`, kept or not.
    """
    share = step_s / num_rows
    best, best_gain = 0, MARGIN * share
    kept, chance = 0.0, 1.0
    for length in range(1, limit + 1):
        chance *= rate
        kept += chance
        gain = kept * share - length * per_token_s
        if gain > best_gain:
            best, best_gain = length, gain
    return best


def draft_limits(
    rows: Sequence[Row], most: int, bytes_for: Callable[[int], int], free_bytes: int
) -> tuple[int, ...]:
    """Tokens that each row may verify beyond its own: within its answer, and all together within free memory; empty
    when there is no room."""
    limits = tuple(max(0, min(most, row.request.max_tokens - row.num_sampled)) for row in rows)
    growth = sum(bytes_for(r.num_tokens + n) - bytes_for(r.num_tokens) for r, n in zip(rows, limits, strict=True))
    return limits if any(limits) and growth <= free_bytes else ()


class DraftSource(Protocol):
    """A model that guesses. `wants_states`: it guesses from what the served model computed, and `saw` shows it that."""

    wants_states: bool

    def saw(self, row: Row, start: int, states: Any) -> None: ...

    def draft(self, row: Row, limit: int) -> tuple[int, ...]: ...

    def close(self, request_id: str) -> None: ...

    def bytes_for(self, num_tokens: int) -> int: ...


@dataclass
class Counters:
    num_drafted: int = 0
    num_kept: int = 0
    num_steps: int = 0
    saved_s: float = 0.0


@dataclass
class Speculator:
    """What the runner asks. `always`: draft whenever there is a guess, whatever it costs (for tests and measuring)."""

    max_draft: int = MAX_DRAFT
    uses_lookup: bool = True
    model: DraftSource | None = None
    always: bool = False
    costs: Costs = field(default_factory=Costs)
    counters: Counters = field(default_factory=Counters)
    _lookups: dict[str, Lookup] = field(default_factory=dict)
    _pools: OrderedDict[str, AnswerPool] = field(default_factory=OrderedDict)
    _model_rates: dict[str, float] = field(default_factory=dict)
    _pauses: dict[str, int] = field(default_factory=dict)

    def draft(self, row: Row, limit: int, num_rows: int) -> tuple[int, ...]:
        """A guess of the row's next tokens, all of whose tokens are known; empty when there is none or it costs more
        than it saves."""
        if not self._may_pay(num_rows):
            return ()
        lookup = self._lookup(row)
        if lookup is not None:
            lookup.catch_up(row.tokens)
            length = self._length(lookup.rate, limit, num_rows)
            if length and (found := lookup.draft(length)):
                return found
        if self.model is None:
            return ()
        length = self._length(self._model_rates.get(row.id, 0.7), limit, num_rows)
        if not length:
            length = self._try_again(row.id, limit)
        return self.model.draft(row, length) if length else ()

    def expects(self, row: Row, num_rows: int) -> bool:
        """There will be a draft for the next step, if its tokens are waited for."""
        if not self._may_pay(num_rows):
            return False
        if self.model is not None:
            return True
        lookup = self._lookup(row)
        if lookup is None:
            return False
        lookup.catch_up(row.tokens)
        return bool(self._length(lookup.rate, self.max_draft, num_rows)) and bool(lookup.draft(1))

    def verified(self, row: Row, num_drafted: int, num_kept: int) -> None:
        """What became of a draft."""
        self.counters.num_drafted += num_drafted
        self.counters.num_kept += num_kept
        self.counters.num_steps += 1
        if self.model is not None:
            rate = self._model_rates.get(row.id, 0.7)
            for holds in [1.0] * num_kept + [0.0] * (num_kept < num_drafted):
                rate += FOLLOW * (holds - rate)
            self._model_rates[row.id] = rate
            if num_kept:
                self._pauses.pop(row.id, None)

    def observe(self, num_tokens: int, num_rows: int, num_kept: int, seconds: float) -> None:
        """A decode step's time, from the last one's tokens to its own."""
        plain = self.costs.of(num_rows)
        if num_tokens > num_rows and plain is not None:
            self.counters.saved_s += plain * (num_rows + num_kept) / num_rows - seconds
        self.costs.observe(num_tokens, seconds)

    @property
    def wants_states(self) -> bool:
        return self.model is not None and self.model.wants_states

    def saw(self, row: Row, start: int, states: Any) -> None:
        """What the served model computed behind the row's tokens from `start` on, which stay."""
        if self.model is not None:
            self.model.saw(row, start, states)

    def close(self, request_id: str) -> None:
        """The row is gone; what it needed is rebuilt from its tokens if it comes back."""
        self._lookups.pop(request_id, None)
        self._model_rates.pop(request_id, None)
        self._pauses.pop(request_id, None)
        if self.model is not None:
            self.model.close(request_id)

    def remember(self, row: Row) -> None:
        """A request has ended; its answer is a guess for later ones with the same key."""
        if self.uses_lookup and not row.request.skips_prefix_cache:
            self._pool(row.request.namespace).add(row.tokens[row.num_prompt_tokens :])

    def bytes_for(self, num_tokens: int) -> int:
        """Device memory that guessing takes for a row of this length."""
        return self.model.bytes_for(num_tokens) if self.model is not None else 0

    def metrics(self) -> Mapping[str, object]:
        c = self.counters
        return {
            "num_draft_tokens": c.num_drafted,
            "num_accepted_tokens": c.num_kept,
            "num_draft_steps": c.num_steps,
            "draft_acceptance": c.num_kept / c.num_drafted if c.num_drafted else None,
            "draft_seconds_saved": round(c.saved_s, 3),
            "seconds_per_draft_token": round(self.costs.per_token, 6),
        }

    def _may_pay(self, num_rows: int) -> bool:
        """Would guesses that always hold pay? With many rows a step is so well used that they do not."""
        return bool(self._length(1.0, self.max_draft, num_rows))

    def _length(self, rate: float, limit: int, num_rows: int) -> int:
        limit = min(limit, self.max_draft)
        step_s = self.costs.of(num_rows)
        if self.always:
            return limit
        if step_s is None:
            return min(limit, 4)
        return best_length(rate, limit, step_s, self.costs.per_token, num_rows)

    def _try_again(self, request_id: str, limit: int) -> int:
        """A draft model's guesses are only checked when paid for: one token now and then, ever more rarely."""
        left = self._pauses.get(request_id, 32)
        self._pauses[request_id] = left - 1 if left else 256
        return 0 if left else min(1, limit)

    def _lookup(self, row: Row) -> Lookup | None:
        if not self.uses_lookup:
            return None
        lookup = self._lookups.get(row.id)
        if lookup is None:
            pool = None if row.request.skips_prefix_cache else self._pool(row.request.namespace)
            lookup = self._lookups[row.id] = Lookup(row.tokens, pool)
        return lookup

    def _pool(self, namespace: str) -> AnswerPool:
        pool = self._pools.get(namespace)
        if pool is None:
            pool = self._pools[namespace] = AnswerPool()
            if len(self._pools) > MAX_POOLS:
                self._pools.popitem(last=False)
        self._pools.move_to_end(namespace)
        return pool


class StepClock:
    """Seconds from one decode step's tokens to the next one's; None where something else lay between them."""

    def __init__(self) -> None:
        self._last: float | None = None

    def lap(self, plan: StepPlan) -> float | None:
        now = time.perf_counter()
        last, self._last = self._last, None if plan.chunks else now
        return now - last if last is not None and not plan.chunks else None

    def stop(self) -> None:
        self._last = None


def num_kept_of(draft: tuple[int, ...], tokens: Sequence[int], errors: Sequence[str | None]) -> int:
    """Drafted tokens that are what the row sampled in their places, each from sound logits."""
    for i, guess in enumerate(draft):
        if tokens[i] != guess or errors[i + 1] is not None:
            return i
    return len(draft)
