"""Stop strings: text in, text that may be shown out. Pure, one matcher a request.

Text that could be the beginning of a stop string is held back until it is known not to be one. The match that ends
first wins (of those, the longest), which makes the outcome independent of how the text was cut into pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """`text` may be shown; when `stop` is set it was found, and nothing may follow. `end` is where the match ends,
    counted in characters of the whole stream."""

    text: str
    stop: str | None = None
    end: int = 0


class StopMatcher:
    def __init__(self, stops: Sequence[str] = (), *, include_stop: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(s for s in stops if s))
        self._longest = max((len(s) for s in self._stops), default=0)
        self._include_stop = include_stop
        self._held = ""
        self._num_shown = 0

    @property
    def held(self) -> str:
        """Text that is kept back for now."""
        return self._held

    def feed(self, text: str) -> StopMatch:
        if not self._stops:
            self._num_shown += len(text)
            return StopMatch(text)
        text = self._held + text
        self._held = ""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        if best is not None:
            end, start, stop = best
            end_of_match = self._num_shown + end
            shown = text[: end if self._include_stop else start]
            self._num_shown += len(shown)
            return StopMatch(shown, stop, end_of_match)
        cut = len(text) - self._num_held_back(text)
        self._held = text[cut:]
        self._num_shown += cut
        return StopMatch(text[:cut])

    def flush(self) -> str:
        """The stream ended without a match: what was held back is text after all."""
        text, self._held = self._held, ""
        self._num_shown += len(text)
        return text

    def _num_held_back(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        for size in range(min(self._longest - 1, len(text)), 0, -1):
            tail = text[-size:]
            if any(stop.startswith(tail) for stop in self._stops):
                return size
        return 0
