"""Finds markers, such as the end of reasoning, in a stream of tokens. No MLX; each match belongs to one thread.

A marker that is one token is looked for by its id. One that is plain text in this vocabulary is looked for in the bytes
of the tokens, because tokenizers join its last character with what follows: `>` and two line breaks are often one
token, and no sequence of ids is then sure to come.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class SpelledMarker:
    """A marker that is plain text. `bytes_of` gives the bytes of a token; `ids` is how the tokenizer spells `text`.

    `rests[k]` spells what is left of it behind k bytes; empty where that is no text.
    """

    text: bytes
    ids: tuple[int, ...]
    bytes_of: Callable[[int], bytes]
    rests: tuple[tuple[int, ...], ...]


Marker = tuple[int, ...] | SpelledMarker
"""Token ids that are sure to come as they are, or a text."""


class MarkerMatch(Protocol):
    """How much of a marker has come. `num_tokens`: of how many tokens the last complete one was a part."""

    num_tokens: int

    def feed(self, token_id: int) -> bool:
        """Take one token; True when it completes the marker (and the match starts again)."""
        ...

    def rest(self) -> tuple[int, ...]:
        """Ids that complete a marker that has begun; empty when none has."""
        ...


def match_of(marker: Marker) -> MarkerMatch:
    return SpelledMatch(marker) if isinstance(marker, SpelledMarker) else TokenMatch(marker)


def ids_of(marker: Marker) -> tuple[int, ...]:
    return marker.ids if isinstance(marker, SpelledMarker) else marker


class _Progress:
    """How much of a sequence the last items fed have matched; a mismatch restarts it as Knuth, Morris and Pratt do."""

    def __init__(self, wanted: Sequence[int]) -> None:
        self.wanted = wanted
        self.num = 0
        self._fallback = [0] * (len(wanted) + 1)
        k = 0
        for i in range(1, len(wanted)):
            while k and wanted[i] != wanted[k]:
                k = self._fallback[k]
            k += wanted[i] == wanted[k]
            self._fallback[i + 1] = k

    def feed(self, item: int) -> bool:
        if not self.wanted:
            return False
        while self.num and self.wanted[self.num] != item:
            self.num = self._fallback[self.num]
        self.num += self.wanted[self.num] == item
        if self.num < len(self.wanted):
            return False
        self.num = 0
        return True


class TokenMatch:
    """A marker by its ids."""

    def __init__(self, marker: Sequence[int]) -> None:
        self._marker = tuple(marker)
        self._progress = _Progress(self._marker)
        self.num_tokens = len(self._marker)

    def feed(self, token_id: int) -> bool:
        return self._progress.feed(token_id)

    def rest(self) -> tuple[int, ...]:
        return self._marker[self._progress.num :] if self._progress.num else ()


class SpelledMatch:
    """A marker by its bytes. What a token holds behind the marker's end is not looked at again."""

    def __init__(self, marker: SpelledMarker) -> None:
        self._marker = marker
        self._progress = _Progress(marker.text)
        self._lengths: deque[int] = deque(maxlen=len(marker.text))  # bytes of the last tokens, up to the present place
        self.num_tokens = 0

    def feed(self, token_id: int) -> bool:
        self._lengths.append(0)
        for byte in self._marker.bytes_of(token_id):
            self._lengths[-1] += 1
            if self._progress.feed(byte):
                self._count()
                return True
        return False

    def rest(self) -> tuple[int, ...]:
        return self._marker.rests[self._progress.num] if self._progress.num else ()

    def _count(self) -> None:
        left = len(self._marker.text)
        self.num_tokens = 0
        while left > 0 and self._lengths:
            left -= self._lengths.pop()
            self.num_tokens += 1
        self._lengths.clear()
