"""Judge of loops: is a sequence writing the same few tokens again and again?

Looks at the last 32 completion tokens, after each token. A policy names two signs of a loop: one token in a row, and a
short pattern in a row. Documents repeat themselves lawfully (a row of zeros, a table), so where a grammar shapes the
answer a loop must last four times as long. Most tokens are cleared by one comparison per pattern length. MLX thread; no
MLX.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

WINDOW = 32
SHAPED_FACTOR = 4
"""How many times longer a loop must be in an answer that a grammar shapes."""


@dataclass(frozen=True, slots=True)
class LoopSigns:
    """What counts as a loop: `num_identical` equal tokens, or a pattern of a length in `pattern_lengths` that stands
    `num_repeats` times in a row."""

    num_identical: int
    pattern_lengths: range
    num_repeats: int


POLICIES: Mapping[str, LoopSigns | None] = {
    "off": None,
    "safe": LoopSigns(8, range(2, 5), 6),
    "strict": LoopSigns(4, range(2, 7), 4),
}


class JudgedRequest(Protocol):
    @property
    def repetition_policy(self) -> str: ...

    @property
    def max_tokens(self) -> int: ...

    @property
    def make_constraint(self) -> object | None: ...


class JudgedSequence(Protocol):
    """The part of `engine.sequence.Sequence` that is looked at."""

    @property
    def request(self) -> JudgedRequest: ...

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def num_completion_tokens(self) -> int: ...


def find_loop(tokens: Sequence[int], num_completion: int, signs: LoopSigns, factor: int = 1) -> str | None:
    """Name of the loop at the end of `tokens`, of which only the last `num_completion` were generated; or None.

    With a `factor` the loop, and the window it is seen in, are that many times as long.
    """
    visible = min(num_completion, WINDOW * factor)
    if _is_periodic(tokens, 1, signs.num_identical * factor, visible):
        return "single_token_run"
    for length in signs.pattern_lengths:
        if _is_periodic(tokens, length, length * signs.num_repeats * factor, visible):
            return f"pattern_loop_len_{length}"
    return None


def _is_periodic(tokens: Sequence[int], period: int, span: int, visible: int) -> bool:
    """Whether the last `span` tokens repeat with `period`; the last token settles it in nearly every case."""
    if span > visible or tokens[-1] != tokens[-1 - period]:
        return False
    start = len(tokens) - span
    return tokens[start + period :] == tokens[start : len(tokens) - period]


class RepetitionJudge:
    """The scheduler's judge: called with a sequence after each of its tokens, names the loop it is caught in."""

    def __init__(self) -> None:
        self.interventions: Counter[str] = Counter()
        self.num_tokens_saved = 0

    def __call__(self, sequence: JudgedSequence) -> str | None:
        signs = POLICIES.get(sequence.request.repetition_policy)
        if signs is None:
            return None
        factor = 1 if sequence.request.make_constraint is None else SHAPED_FACTOR
        loop = find_loop(sequence.tokens, sequence.num_completion_tokens, signs, factor)
        if loop is not None:
            self.interventions[loop] += 1
            self.num_tokens_saved += sequence.request.max_tokens - sequence.num_completion_tokens
        return loop

    def report(self) -> dict[str, object]:
        """Counters for diagnostics. `tokens_saved` counts up to `max_tokens`, so it is an upper bound."""
        return {
            "interventions_total": self.interventions.total(),
            "interventions": dict(self.interventions),
            "tokens_saved": self.num_tokens_saved,
        }
