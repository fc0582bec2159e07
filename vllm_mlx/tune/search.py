"""Chooses values by measurement; knows neither engines nor clocks, only a `Measurer`. Pure.

All candidates take turns within each round, and a candidate is judged by its ratios to the default in the same rounds:
a busy moment hurts both. A default is left only for a gain that is more than noise. At the end defaults and choices
take turns on the same work, and that is what is reported.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

T = TypeVar("T")
# Of a default's time, what a candidate must spare in the median.
WORTHWHILE = 0.03
# A smaller row limit is as good if it gives so much of the best rate.
ENOUGH_OF_BEST = 0.97
CHUNKS = (128, 256, 512, 1024, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
GUESSING_ROWS = (1, 8)
# What guessing may cost where there is nothing to guess.
WORST_GUESSING = 0.97


@dataclass(frozen=True, slots=True)
class Knobs:
    """The settings that are tried."""

    prefill_step_size: int
    max_num_seqs: int
    speculation: str


class Measurer(Protocol):
    """Measures on a loaded model; every number is of work done anew, never of a cached result."""

    def prefill_s(self, knobs: Knobs) -> float:
        """Seconds until a long prompt, which nobody has seen before, has its first token."""
        ...

    def decode_rates(self, rows: Sequence[int]) -> dict[int, float]:
        """Tokens a second of each of so many rows decoding together; rows that do not fit are left out."""
        ...

    def copying_s(self, knobs: Knobs, num_rows: int) -> float:
        """Seconds for answers that were given before, so that they can be guessed."""
        ...

    def writing_s(self, knobs: Knobs, num_rows: int) -> float:
        """Seconds for answers in which there is nothing to guess."""
        ...

    def crowd_s(self, knobs: Knobs, num_requests: int) -> float:
        """Seconds for a crowd of short requests that come at once."""
        ...


@dataclass(frozen=True, slots=True)
class Comparison:
    """One kind of work, before and after: medians in seconds, and the ratio of each round (over 1: better now)."""

    work: str
    before_s: float
    after_s: float
    ratios: tuple[float, ...]

    @property
    def gain(self) -> float:
        return statistics.median(self.ratios)


@dataclass(frozen=True, slots=True)
class Outcome:
    before: Knobs
    after: Knobs
    comparisons: tuple[Comparison, ...]


def search(measurer: Measurer, before: Knobs, *, num_rounds: int, can_guess: bool, say: Callable[[str], None]
           ) -> Outcome:
    """The best knobs found, and what they bring beside those before."""
    after = replace(before, prefill_step_size=choose_chunk(measurer, before, num_rounds, say))
    after = replace(after, max_num_seqs=choose_rows(measurer, before, num_rounds, say))
    if can_guess:
        after = replace(after, speculation=choose_guessing(measurer, after, num_rounds, say))
    return confirm(measurer, before, after, num_rounds, say)


def choose_chunk(measurer: Measurer, before: Knobs, num_rounds: int, say: Callable[[str], None]) -> int:
    """Prompt tokens a step: the fastest, unless the default is about as fast."""
    default = before.prefill_step_size
    sizes = sorted({*CHUNKS, default})
    ratios: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(num_rounds):
        times = {
            size: measurer.prefill_s(replace(before, prefill_step_size=size)) for size in _turned(sizes, number)
        }
        for size in sizes:
            ratios[size].append(times[default] / times[size])
    gains = {size: statistics.median(found) for size, found in ratios.items()}
    for size in sizes:
        say(f"  chunks of {size:4d}: {gains[size]:.2f} times as fast as of {default}")
    best = max(sizes, key=lambda size: gains[size])
    return best if gains[best] >= 1 + WORTHWHILE else default


def choose_rows(measurer: Measurer, before: Knobs, num_rounds: int, say: Callable[[str], None]) -> int:
    """Rows of a step: the fewest that give about all that any number of rows gives. More would only wait for each
    other in the step instead of in the queue."""
    rates: dict[int, list[float]] = {}
    for _ in range(num_rounds):
        for rows, rate in measurer.decode_rates([n for n in ROWS if n <= before.max_num_seqs]).items():
            rates.setdefault(rows, []).append(rate)
    medians = {rows: statistics.median(found) for rows, found in sorted(rates.items())}
    for rows, rate in medians.items():
        say(f"  {rows:3d} rows: {rate:.0f} tokens/s")
    best = max(medians.values(), default=0.0)
    enough = min((rows for rows, rate in medians.items() if rate >= ENOUGH_OF_BEST * best), default=0)
    # The largest number tried says nothing of those beyond it.
    return before.max_num_seqs if enough in (0, max(medians)) else enough


def choose_guessing(measurer: Measurer, knobs: Knobs, num_rounds: int, say: Callable[[str], None]) -> str:
    """Guessing on, if copies gain by it and new text does not lose; else off."""
    found: dict[str, list[float]] = {"copying": [], "writing": []}
    for number in range(num_rounds):
        for num_rows in GUESSING_ROWS:
            if num_rows > knobs.max_num_seqs:
                continue
            for work, measure in (("copying", measurer.copying_s), ("writing", measurer.writing_s)):
                times = {
                    mode: measure(replace(knobs, speculation=mode), num_rows)
                    for mode in _turned(["off", "auto"], number)
                }
                found[work].append(times["off"] / times["auto"])
    copying, writing = (statistics.median(found[work]) for work in ("copying", "writing"))
    say(f"  guessing: {copying:.2f} times as fast where text comes again, {writing:.2f} times where it does not")
    return "auto" if copying >= 1 + WORTHWHILE and writing >= WORST_GUESSING else "off"


def confirm(
    measurer: Measurer, before: Knobs, after: Knobs, num_rounds: int, say: Callable[[str], None]
) -> Outcome:
    """Both in turns on the same kinds of work; what was changed without a gain there goes back to what it was."""
    crowd = min(256, 2 * min(after.max_num_seqs, before.max_num_seqs))
    # Each with the knob that it judges. Copies are shown, but do not judge: guessing was given up for what is new.
    works: Mapping[str, tuple[str | None, Callable[[Knobs], float]]] = {
        "a long prompt's first token": ("prefill_step_size", measurer.prefill_s),
        f"{crowd} short requests at once": ("max_num_seqs", lambda knobs: measurer.crowd_s(knobs, crowd)),
        "an answer given before": (None, lambda knobs: measurer.copying_s(knobs, 1)),
        "a new answer": ("speculation", lambda knobs: measurer.writing_s(knobs, 1)),
    }
    times: dict[str, list[dict[str, float]]] = {work: [] for work in works}
    sides = {"before": before, "after": after}
    for number in range(num_rounds):
        say(f"  before and after, round {number + 1} of {num_rounds}")
        for work, (_, measure) in works.items():
            times[work].append({name: measure(sides[name]) for name in _turned(list(sides), number)})
    comparisons = tuple(
        Comparison(
            work,
            statistics.median(found["before"] for found in rounds),
            statistics.median(found["after"] for found in rounds),
            tuple(found["before"] / found["after"] for found in rounds),
        )
        for work, rounds in times.items()
    )
    for comparison in comparisons:
        name = works[comparison.work][0]
        if name is None or getattr(before, name) == getattr(after, name):
            continue
        if comparison.gain < 1 - WORTHWHILE:
            say(f"  {name} {getattr(after, name)} was slower in the end and is not kept")
            after = replace(after, **{name: getattr(before, name)})
    return Outcome(before, after, comparisons)


def _turned(items: Sequence[T], number: int) -> list[T]:
    """Who goes first changes with the round."""
    turn = number % len(items)
    return [*items[turn:], *items[:turn]]
