"""Judge of batched answers: does a greedy request get the tokens it gets alone?

Pairs of token lists in, verdict out; `engine/replay.py` makes the pairs when the engine is idle. The verdict is the
mean agreement of the last few probes, and once bad it lasts until several probes in a row agreed. A probe that failed
says nothing. MLX thread; no MLX.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

log = logging.getLogger(__name__)

NUM_KEPT = 8
NUM_GOOD_TO_RECOVER = 3


class Verdict(StrEnum):
    UNKNOWN = "unknown"
    PASS = "pass"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Comparison:
    """One probe. `first_difference` is the index of the first completion token that differs, None if none does."""

    request_id: str
    agreement: float
    first_difference: int | None
    num_tokens: int
    rows: int
    has_media: bool = False


def compare(request_id: str, batched: Sequence[int], alone: Sequence[int], *, rows: int, has_media: bool = False
            ) -> Comparison:
    """Token by token, position by position; what one list lacks counts as different."""
    length = max(len(batched), len(alone))
    equal = [a == b for a, b in zip(batched, alone, strict=False)]
    first = next((i for i, same in enumerate(equal) if not same), None)
    if first is None and len(equal) < length:
        first = len(equal)
    return Comparison(request_id, sum(equal) / length if length else 1.0, first, length, rows, has_media)


@dataclass
class DivergenceGuard:
    """`threshold`: mean agreement of the last probes below which answers count as diverging."""

    threshold: float = 0.95
    action: str = "warn"
    num_good_to_recover: int = NUM_GOOD_TO_RECOVER
    num_failed: int = 0
    num_interrupted: int = 0
    last_failure: str | None = None
    num_probes: int = 0
    _recent: deque[Comparison] = field(default_factory=lambda: deque(maxlen=NUM_KEPT))
    _num_good: int = 0
    _is_diverging: bool = False

    @property
    def verdict(self) -> Verdict:
        if self._is_diverging:
            return Verdict.WARNING
        return Verdict.PASS if self._recent else Verdict.UNKNOWN

    @property
    def serializes(self) -> bool:
        """Whether one row at a time is asked for now."""
        return self._is_diverging and self.action == "serialize"

    @property
    def agreement(self) -> float | None:
        """Mean over the last probes; None before the first."""
        return sum(c.agreement for c in self._recent) / len(self._recent) if self._recent else None

    def observe(self, comparison: Comparison) -> None:
        """Take in the result of a probe."""
        self.num_probes += 1
        self._recent.append(comparison)
        is_good = comparison.agreement >= self.threshold
        self._num_good = self._num_good + 1 if is_good else 0
        if self._is_diverging:
            if self._num_good >= self.num_good_to_recover:
                self._is_diverging = False
                for _ in range(len(self._recent) - self._num_good):
                    self._recent.popleft()
                log.info("batched answers agree with lone ones again (%d probes in a row)", self._num_good)
            return
        mean = self.agreement
        if mean is not None and mean < self.threshold:
            self._is_diverging = True
            log.warning(
                "batched answers differ from lone ones: agreement %.3f under %.3f; request %s first differs at token "
                "%s%s", mean, self.threshold, comparison.request_id, comparison.first_difference,
                "; one row at a time until probes agree" if self.action == "serialize" else "",
            )

    def failed(self, detail: str) -> None:
        """A probe ended with an error; its answer is unknown, which is not divergence."""
        self.num_failed += 1
        self.last_failure = detail

    def interrupted(self) -> None:
        """A probe gave way to a client's request."""
        self.num_interrupted += 1

    def report(self) -> dict[str, object]:
        """State for diagnostics."""
        last = self._recent[-1] if self._recent else None
        return {
            "status": self.verdict.value,
            "threshold": self.threshold,
            "action": self.action,
            "serialize_active": self.serializes,
            "sample_count": self.num_probes,
            "failed_probes": self.num_failed,
            "interrupted_probes": self.num_interrupted,
            "last_failure": self.last_failure,
            "agreement": None if self.agreement is None else round(self.agreement, 4),
            "last_token_agreement": round(last.agreement, 4) if last else None,
            "last_first_difference": last.first_difference if last else None,
            "last_had_media": last.has_media if last else None,
            "good_probes_in_a_row": self._num_good,
        }
