"""Breaks a terminal's lines between words while their text arrives in pieces. Pure: text in, text to print out.

A word is held back until what follows it is known. Code between fences is left as it is, so that it can be copied.
"""

from __future__ import annotations

import re

from rich.cells import cell_len

# Signs of Chinese, Japanese and Korean stand for themselves: a line may end between any two.
WIDE = "\u2e80-\u9fff\uac00-\ud7a3\uf900-\ufaff\uff00-\uff60"
PART = re.compile(rf"\n|[ \t]+|[{WIDE}]|[^\s{WIDE}]+")


class Wrapper:
    """For a terminal of `width` cells; a piece's words come out of `feed` or, the last one, of `end`."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._column = 0
        self._gap = ""
        self._word = ""
        self._line = ""
        self._is_code = False

    def feed(self, text: str) -> str:
        return "".join(self._take(part) for part in PART.findall(text))

    def end(self) -> str:
        """The word that was held back."""
        return self._flush()

    def _take(self, part: str) -> str:
        if part == "\n":
            out = self._flush() + self._gap + "\n"
            if self._line.lstrip().startswith("```"):
                self._is_code = not self._is_code
            self._column, self._gap, self._line = 0, "", ""
            return out
        self._line += part
        if part[0] in " \t":
            out = self._flush()
            self._gap += part
            return out
        if self._is_code or re.match(f"[{WIDE}]", part):
            before = self._flush()
            self._word = part
            return before + self._flush()
        self._word += part
        return ""

    def _flush(self) -> str:
        gap, word = self._gap, self._word
        if not word:
            return ""
        self._gap = self._word = ""
        size = cell_len(gap + word)
        if not self._is_code and self._column and self._column + size > self._width:
            self._column = cell_len(word)
            return "\n" + word
        self._column = (self._column + size) % self._width if self._column + size > self._width else self._column + size
        return gap + word
