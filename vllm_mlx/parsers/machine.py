"""The base of every parser: text in, events out, nothing else. No I/O, no globals, no tokens.

A parser writes `run` as a plain program over its input; where it needs text that has not been generated yet, the
reading methods below suspend it (they are generators, called with `yield from`), and `feed` resumes it. So the program
reads top to bottom, and the place where the text was cut cannot change what it does: a reading method decides only
what no further text could change, and holds back the rest. At the end of the generation they decide with what is there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

from vllm_mlx.parsers.events import ParserEvent, ParserNote, ReasoningDelta, TextDelta, ToolCallDelta

T = TypeVar("T")
Steps = Generator[None, None, T]

_COMPACT_AT = 16_384  # consumed characters kept before the buffer is cut


class Broken(Exception):
    """The text is not what the format says here. Raised and caught inside parsers; never leaves them."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Markers:
    """A set of strings looked for together: the leftmost wins, of two at one place the longer."""

    def __init__(self, texts: Iterable[str]) -> None:
        self.texts = tuple(sorted({t for t in texts if t}, key=lambda t: (-len(t), t)))
        self._pattern = re.compile("|".join(re.escape(t) for t in self.texts)) if self.texts else None
        self._first = frozenset(t[0] for t in self.texts)
        self._longest = max((len(t) for t in self.texts), default=0)

    def find(self, buffer: str, start: int) -> re.Match[str] | None:
        return self._pattern.search(buffer, start) if self._pattern else None

    def hold_from(self, buffer: str, start: int) -> int:
        """Where the text begins that could still become a marker (the end of the buffer when none could)."""
        end = len(buffer)
        for i in range(max(start, end - self._longest + 1), end):
            if buffer[i] in self._first:
                tail = buffer[i:]
                if any(len(t) > len(tail) and t.startswith(tail) for t in self.texts):
                    return i
        return end


def coalesce(events: Iterable[ParserEvent]) -> list[ParserEvent]:
    """The same events with neighbouring pieces joined: how a stream was cut does not show any more."""
    joined: list[ParserEvent] = []
    pieces: list[str] = []

    def flush() -> None:
        if len(pieces) > 1:
            match joined[-1]:
                case ToolCallDelta(index):
                    joined[-1] = ToolCallDelta(index, "".join(pieces))
                case TextDelta():
                    joined[-1] = TextDelta("".join(pieces))
                case ReasoningDelta():
                    joined[-1] = ReasoningDelta("".join(pieces))
        pieces.clear()

    for event in events:
        last = joined[-1] if pieces else None
        match event:
            case ToolCallDelta(index, piece):
                is_next = isinstance(last, ToolCallDelta) and last.index == index
            case TextDelta(piece):
                is_next = isinstance(last, TextDelta)
            case ReasoningDelta(piece):
                is_next = isinstance(last, ReasoningDelta)
            case _:
                flush()
                joined.append(event)
                continue
        if not is_next:
            flush()
            joined.append(event)
        pieces.append(piece)
    flush()
    return joined


class Machine:
    """One request's parser. `feed` and `finish` never raise, whatever the text."""

    def __init__(self) -> None:
        self._buffer = ""
        self._pos = 0
        self._keep: int | None = None  # text from here on may be needed again, consumed or not
        self._marker_at = 0  # where the marker last found by `until` begins, with the space trimmed before it
        self._ended = False
        self._events: list[ParserEvent] = []
        self._program: Steps[None] | None = None

    # -- from outside -------------------------------------------------------------------------------------------------

    def feed(self, text: str) -> list[ParserEvent]:
        """Take the next piece of generated text; return what is now certain."""
        if not text or self._ended:
            return []
        self._compact()
        self._buffer += text
        return self._resume()

    def finish(self) -> list[ParserEvent]:
        """The generation is over: decide about all text held back. Further calls do nothing."""
        if self._ended:
            return []
        self._ended = True
        return self._resume()

    def run(self) -> Steps[None]:
        """The program; returns when the input has ended."""
        raise NotImplementedError

    def _resume(self) -> list[ParserEvent]:
        if self._program is None:
            self._program = self.run()
        next(self._program, None)
        events, self._events = self._events, []
        return coalesce(events)

    def _compact(self) -> None:
        cut = self._pos if self._keep is None else min(self._pos, self._keep)
        if cut > _COMPACT_AT:
            self._buffer = self._buffer[cut:]
            self._pos -= cut
            if self._keep is not None:
                self._keep -= cut

    # -- for programs: saying -----------------------------------------------------------------------------------------

    def emit(self, event: ParserEvent) -> None:
        self._events.append(event)

    def note(self, reason: str) -> None:
        self._events.append(ParserNote(reason))

    # -- for programs: reading ----------------------------------------------------------------------------------------

    def more(self) -> Steps[bool]:
        """Wait for more text; False when none will come."""
        if self._ended:
            return False
        yield
        return True

    def peek(self, count: int = 1) -> Steps[str]:
        """The next `count` characters without consuming them; fewer only at the end."""
        while len(self._buffer) - self._pos < count:
            if not (yield from self.more()):
                break
        return self._buffer[self._pos : self._pos + count]

    def skip(self, count: int) -> None:
        """Consume characters already seen by `peek`."""
        self._pos += count

    def unread(self, text: str) -> None:
        """Give back the text just consumed; the next reading method meets it again."""
        self._pos -= len(text)

    def skip_space(self) -> Steps[None]:
        while True:
            while self._pos < len(self._buffer) and self._buffer[self._pos].isspace():
                self._pos += 1
            if self._pos < len(self._buffer) or not (yield from self.more()):
                return

    def looking_at(self, *texts: str) -> Steps[str | None]:
        """The longest of `texts` that comes next, not consumed; None when none does."""
        while True:
            rest = self._buffer[self._pos : self._pos + max(len(t) for t in texts)]
            open_ = [t for t in texts if len(t) > len(rest) and t.startswith(rest)]
            if open_ and (yield from self.more()):
                continue
            found = [t for t in texts if rest.startswith(t)]
            return max(found, key=len) if found else None

    def accept(self, *texts: str) -> Steps[str | None]:
        """Consume the longest of `texts` that comes next, if any does."""
        found = yield from self.looking_at(*texts)
        if found is not None:
            self._pos += len(found)
        return found

    def expect(self, *texts: str) -> Steps[str]:
        """Like `accept`, where nothing else may come."""
        found = yield from self.accept(*texts)
        if found is None:
            wanted = " or ".join(repr(t) for t in texts)
            raise Broken(f"the text ended before {wanted}" if self.is_at_end else f"expected {wanted}")
        return found

    def take_while(self, pattern: re.Pattern[str], limit: int = 1_000_000) -> Steps[str]:
        """Consume the run of characters that match `pattern` (a pattern of one character)."""
        taken: list[str] = []
        size = 0
        while True:
            while self._pos < len(self._buffer) and size < limit and pattern.match(self._buffer[self._pos]):
                taken.append(self._buffer[self._pos])
                self._pos += 1
                size += 1
            if size >= limit or self._pos < len(self._buffer) or not (yield from self.more()):
                return "".join(taken)

    def take_run(self, pattern: re.Pattern[str]) -> str:
        """Consume the run that is here already (`pattern` is greedy and may be resumed anywhere); may be empty."""
        match = pattern.match(self._buffer, self._pos)
        if match is None:
            return ""
        self._pos = match.end()
        return match.group()

    def until(self, markers: Markers, say: Callable[[str], None], *, trim: bool = False) -> Steps[str | None]:
        """Pass text to `say` up to the first marker, consume it and return it; None at the end.

        With `trim`, white space directly before a marker is left out (it is kept when the text just ends).
        """
        while True:
            hold = markers.hold_from(self._buffer, self._pos)
            match = markers.find(self._buffer, self._pos)
            if match is not None and (match.start() < hold or self._ended):
                text = self._buffer[self._pos : match.start()]
                text = text.rstrip() if trim else text
                self._marker_at = self._pos + len(text)
                self._pos = match.end()
                self._say(text, say)
                return match.group()
            hold = min(hold, match.start()) if match is not None else hold
            text = self._buffer[self._pos : hold]
            if trim and not self._ended:
                text = text.rstrip()
            if self._ended:
                text = self._buffer[self._pos :]
            self._pos += len(text)
            self._say(text, say)
            if not (yield from self.more()):
                return None

    def collect_until(self, *texts: str, limit: int | None = None) -> Steps[tuple[str, str]]:
        """The text up to the first of `texts`, and which it was; both consumed. Broken at the end or past `limit`."""
        parts: list[str] = []
        size = 0

        def say(text: str) -> None:
            nonlocal size
            parts.append(text)
            size += len(text)
            if limit is not None and size > limit:
                raise Broken(f"no {texts[0]!r} within {limit} characters")

        marker = yield from self.until(Markers(texts), say)
        if marker is None:
            raise Broken(f"the text ended before {texts[0]!r}")
        return "".join(parts), marker

    @property
    def is_at_end(self) -> bool:
        """Nothing is left and nothing will come."""
        return self._ended and self._pos >= len(self._buffer)

    @staticmethod
    def _say(text: str, say: Callable[[str], None]) -> None:
        if text:
            say(text)
