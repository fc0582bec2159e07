"""Writes one JSON value piece by piece, so that a call's arguments can be streamed while they are read.

What was written is valid JSON once `close` has been called, wherever the source broke off: a key is written together
with its value, never alone. Style is `json.dumps`'s own (`{"a": 1, "b": 2}`). Knows nothing of parsers.
"""

from __future__ import annotations

import json
from collections.abc import Callable

_MAX_NUMBER = 300  # characters; a longer number is written as a string, readers choke on it


class JsonWriter:
    """`say` gets the text of the JSON document in pieces."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._closers: list[str] = []
        self._counts: list[int] = []
        self._key: str | None = None
        self._in_string = False
        self._is_empty = True

    @property
    def depth(self) -> int:
        return len(self._closers)

    @property
    def is_complete(self) -> bool:
        """Exactly one whole value was written."""
        return not self._is_empty and not self._closers and not self._in_string

    @property
    def lacks_value(self) -> bool:
        """A string is open, or a key waits for its value."""
        return self._in_string or self._key is not None

    @property
    def is_empty(self) -> bool:
        return self._is_empty

    def begin_object(self) -> None:
        self._begin("{", "}")

    def begin_array(self) -> None:
        self._begin("[", "]")

    def end(self) -> None:
        """End the innermost object or array."""
        if self._key is not None:
            self.literal("null")
        self._counts.pop()
        self._say(self._closers.pop())

    def key(self, text: str) -> None:
        """Name the next value; written when that value begins."""
        self._key = text

    def literal(self, text: str) -> None:
        """A value already in JSON: a number, true, false, null, or a whole document."""
        self._before_value()
        self._say(text)

    def number(self, text: str) -> None:
        self.literal(text if len(text) <= _MAX_NUMBER else json.dumps(text))

    def string(self, text: str) -> None:
        self.literal(json.dumps(text, ensure_ascii=False))

    def begin_string(self) -> None:
        self._before_value()
        self._in_string = True
        self._say('"')

    def text(self, text: str) -> None:
        """Characters of the string, to be escaped."""
        if text:
            self._say(json.dumps(text, ensure_ascii=False)[1:-1])

    def raw(self, text: str) -> None:
        """Characters of the string, escaped already."""
        if text:
            self._say(text)

    def end_string(self) -> None:
        self._in_string = False
        self._say('"')

    def close(self) -> None:
        """Finish whatever is open; an empty document becomes `{}`."""
        if self._in_string:
            self.end_string()
        if self._is_empty:
            self.begin_object()
        self._key = None
        while self._closers:
            self.end()

    def _begin(self, opener: str, closer: str) -> None:
        self._before_value()
        self._closers.append(closer)
        self._counts.append(0)
        self._say(opener)

    def _before_value(self) -> None:
        self._is_empty = False
        prefix = ""
        if self._counts:
            prefix = ", " if self._counts[-1] else ""
            self._counts[-1] += 1
        if self._key is not None:
            prefix += json.dumps(self._key, ensure_ascii=False) + ": "
            self._key = None
        if prefix:
            self._say(prefix)
