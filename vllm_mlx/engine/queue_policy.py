"""Who is next: an object the scheduler asks. Plain Python, no clock of its own.

Interactive before background, callers that had less before callers that had more, short prefills before long ones, the
older first. Whoever has waited for long counts as interactive and as short, so nobody starves. Under pressure the
background gives way before the interactive, and among equals the younger before the older.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from vllm_mlx.engine.request import INTERACTIVE
from vllm_mlx.engine.sequence import Sequence

# Two callers' shares differ when one had this factor more; below the first, all are equal.
_SHARE_TOKENS = 4096


class QueuePolicy(Protocol):
    """Decides order only; whether there is room is the scheduler's question."""

    def order(self, waiting: Iterable[Sequence], now: float, remaining: Callable[[Sequence], int]) -> list[Sequence]:
        """The waiting, next first. `remaining` gives the prompt tokens a sequence still has to compute."""
        ...

    def prefill_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        """Running sequences in the order in which their prompt chunks are planned."""
        ...

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        """Standing under memory pressure: the greatest gives way first. Never changes while a sequence lives."""
        ...

    def displaces(self, candidate: Sequence, victim: Sequence, now: float) -> bool:
        """Whether a waiting sequence is worth preempting a running one for; it then goes before it in `order`, too."""
        ...

    def served(self, sequence: Sequence, num_tokens: int, now: float) -> None:
        """Tokens were computed for the sequence's caller."""
        ...


@dataclass
class QueueClock:
    """Learns how often somebody leaves the queue while it is not empty, and so how long a place in it will take."""

    interval_s: float | None = None
    _last: float | None = None

    def admitted(self, now: float, *, is_queue_empty: bool) -> None:
        if self._last is not None:
            known, seen = self.interval_s, now - self._last
            self.interval_s = seen if known is None else known + 0.2 * (seen - known)
        self._last = None if is_queue_empty else now

    def predicted_wait_s(self, position: int) -> float | None:
        """Seconds until the sequence at this place (0 is next) is admitted; None while nothing is known."""
        return None if self.interval_s is None else (position + 1) * self.interval_s


@dataclass
class FairPolicy:
    """`ageing_s`: a wait after which everybody is equal. Shares of callers fade with `fade_s`."""

    ageing_s: float = 20.0
    fade_s: float = 60.0
    _shares: dict[str, tuple[float, float]] = field(default_factory=dict)

    def order(self, waiting: Iterable[Sequence], now: float, remaining: Callable[[Sequence], int]) -> list[Sequence]:
        def key(sequence: Sequence) -> tuple[int, int, int, int]:
            share = self._share_level(sequence.request.client, now)
            left = 0 if self._is_aged(sequence, now) else remaining(sequence)
            return self._class(sequence, now), share, left, sequence.order

        return sorted(waiting, key=key)

    def prefill_order(self, running: Iterable[Sequence], now: float) -> list[Sequence]:
        def key(sequence: Sequence) -> tuple[int, int, int]:
            left = 0 if self._is_aged(sequence, now) else sequence.num_to_prefill
            return self._class(sequence, now), left, sequence.order

        return sorted(running, key=key)

    def rank(self, sequence: Sequence) -> tuple[int, int]:
        return sequence.request.priority, sequence.order

    def displaces(self, candidate: Sequence, victim: Sequence, now: float) -> bool:
        return self._class(candidate, now) < self._class(victim, now)

    def _is_aged(self, sequence: Sequence, now: float) -> bool:
        return now - sequence.arrived >= self.ageing_s

    def _class(self, sequence: Sequence, now: float) -> int:
        priority = sequence.request.priority
        return min(priority, INTERACTIVE) if self._is_aged(sequence, now) else priority

    def served(self, sequence: Sequence, num_tokens: int, now: float) -> None:
        client = sequence.request.client
        self._shares[client] = (self._share(client, now) + num_tokens, now)
        if len(self._shares) > 1024:
            self._shares = {c: s for c, s in self._shares.items() if self._share(c, now) >= 1}

    def _share(self, client: str, now: float) -> float:
        tokens, since = self._shares.get(client, (0.0, now))
        return tokens * math.exp(-(now - since) / self.fade_s)

    def _share_level(self, client: str, now: float) -> int:
        return int(math.log2(1 + self._share(client, now) / _SHARE_TOKENS))
