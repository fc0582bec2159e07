"""Reads one value as models write them and writes it as strict JSON, character by character where it can.

Understood besides JSON: single quotes, Python's True/False/None, tuples and escapes, bare keys, trailing commas, raw
line breaks in strings, needless escapes (`\\|`), and strings between Gemma's markers. Nothing here decides what a
value means; `schema.py` does that.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass

from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Machine, Markers, Steps

MAX_DEPTH = 100


@dataclass(frozen=True, slots=True)
class Dialect:
    """What is read beyond lenient JSON. `quotes`: marks on both sides of a string that has no escapes."""

    is_python: bool = False
    has_bare_strings: bool = False
    quotes: tuple[str, ...] = ()


JSON = Dialect()
PYTHON = Dialect(is_python=True)

_WORDS = {
    "true": "true",
    "false": "false",
    "null": "null",
    "True": "true",
    "False": "false",
    "None": "null",
    "undefined": "null",
    "NaN": "null",
    "nan": "null",
    "Infinity": "null",
    "-Infinity": "null",
}
_CLOSERS = {"{": "}", "[": "]", "(": ")"}
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?\Z", re.ASCII)
_PYTHON_NUMBER = re.compile(r"[+-]?(?:0[xX][0-9a-fA-F]+|(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE][+-]?\d+)?)\Z", re.ASCII)
_SCALAR = re.compile(r"[^\s,:=\[\]{}()\"'<]")
_BARE = re.compile(r"[^,\[\]{}]")
_KEY = re.compile(r"[^\s,:=\[\]{}()\"'<]")
_RUNS = {'"': re.compile(r'[^"\\\x00-\x1f]+'), "'": re.compile(r"[^'\"\\\x00-\x1f]+")}
_SIMPLE_ESCAPES = frozenset('"\\/bfnrt')
_PYTHON_ESCAPES = {"'": "'", "a": "\a", "v": "\v", "0": "\0", "\n": ""}
_HEX = re.compile(r"[0-9a-fA-F]+\Z")


def read_value(p: Machine, w: JsonWriter, dialect: Dialect = JSON) -> Steps[None]:
    """Copy the value that comes next to `w`; `p` is left right behind it. Broken leaves `w` to be closed."""
    closers: list[str] = []
    while True:
        is_open = yield from _begin_value(p, w, dialect, closers)
        if is_open:
            yield from p.skip_space()
            if (yield from p.accept(closers[-1])) is None:
                if closers[-1] == "}":
                    yield from _read_key(p, w, dialect)
                continue
            closers.pop()
            w.end()
        while True:
            if not closers:
                return
            yield from p.skip_space()
            found = yield from p.expect(",", closers[-1])
            if found == ",":
                yield from p.skip_space()
                if (yield from p.accept(closers[-1])) is None:
                    if closers[-1] == "}":
                        yield from _read_key(p, w, dialect)
                    break
            closers.pop()
            w.end()


def _begin_value(p: Machine, w: JsonWriter, dialect: Dialect, closers: list[str]) -> Steps[bool]:
    """Read a whole scalar or string (False), or the bracket that opens a container (True)."""
    yield from p.skip_space()
    first = yield from p.peek()
    if first in ("{", "[") or (first == "(" and dialect.is_python):
        if len(closers) >= MAX_DEPTH:
            raise Broken(f"nested deeper than {MAX_DEPTH}")
        p.skip(1)
        closers.append(_CLOSERS[first])
        if first == "{":
            w.begin_object()
        else:
            w.begin_array()
        return True
    if dialect.is_python and first in ("r", "f", "b", "u") and (yield from p.peek(2))[1:] in ("'", '"'):
        p.skip(1)
        first = yield from p.peek()
    if first in ("'", '"') or (yield from _at_quote(p, dialect)):
        w.begin_string()
        yield from read_string(p, w, dialect)
        w.end_string()
        return False
    if not first:
        raise Broken("the text ended before a value")
    yield from _read_scalar(p, w, dialect)
    return False


def _at_quote(p: Machine, dialect: Dialect) -> Steps[bool]:
    return bool(dialect.quotes) and (yield from p.looking_at(*dialect.quotes)) is not None


def read_string(p: Machine, w: JsonWriter, dialect: Dialect = JSON) -> Steps[None]:
    """Copy a quoted string's content to `w`, inside a string begun there; `p` stands at the opening quote."""
    if dialect.quotes and (quote := (yield from p.accept(*dialect.quotes))) is not None:
        if (yield from p.until(Markers([quote]), w.text)) is None:
            raise Broken("the text ended inside a string")
        return
    openers = ('"""', "'''", '"', "'") if dialect.is_python else ('"', "'")
    quote = yield from p.expect(*openers)
    if len(quote) == 3:
        if (yield from p.until(Markers([quote]), w.text)) is None:
            raise Broken("the text ended inside a string")
        return
    run = _RUNS[quote]
    while True:
        char = yield from p.peek()
        if not char:
            raise Broken("the text ended inside a string")
        w.raw(p.take_run(run))
        char = yield from p.peek()
        if char == quote:
            p.skip(1)
            return
        if char == "\\":
            yield from _read_escape(p, w, dialect)
        elif char and not run.match(char):
            p.skip(1)
            w.text(char)


def _read_escape(p: Machine, w: JsonWriter, dialect: Dialect) -> Steps[None]:
    char = (yield from p.peek(2))[1:]
    if not char:
        raise Broken("the text ended inside a string")
    if char == "u":
        code = yield from _hex_escape(p, 4)
        if code is None:
            p.skip(2)
            w.raw("\\\\u")
        elif 0xD800 <= code < 0xDC00:
            p.skip(6)
            yield from _read_low_surrogate(p, w, code)
        else:
            p.skip(6)
            w.raw("\\ufffd" if 0xDC00 <= code < 0xE000 else f"\\u{code:04x}")
        return
    if dialect.is_python and char in ("x", "U"):
        width = 2 if char == "x" else 8
        code = yield from _hex_escape(p, width)
        if code is not None and code <= 0x10FFFF and not 0xD800 <= code < 0xE000:
            p.skip(2 + width)
            w.text(chr(code))
            return
    p.skip(2)
    if char in _SIMPLE_ESCAPES:
        w.raw("\\" + char)
    elif char == "'" or (dialect.is_python and char in _PYTHON_ESCAPES):
        w.text(_PYTHON_ESCAPES[char])
    else:
        w.text("\\" + char)  # a regex or a path: the model meant the backslash


def _hex_escape(p: Machine, width: int) -> Steps[int | None]:
    digits = (yield from p.peek(2 + width))[2:]
    return int(digits, 16) if len(digits) == width and _HEX.match(digits) else None


def _read_low_surrogate(p: Machine, w: JsonWriter, high: int) -> Steps[None]:
    """The second half of a pair; a half alone cannot be encoded and becomes U+FFFD."""
    if (yield from p.looking_at("\\u")) is not None:
        low = yield from _hex_escape(p, 4)
        if low is not None and 0xDC00 <= low < 0xE000:
            p.skip(6)
            w.raw(f"\\u{high:04x}\\u{low:04x}")
            return
    w.raw("\\ufffd")


def _read_scalar(p: Machine, w: JsonWriter, dialect: Dialect) -> Steps[None]:
    text = yield from p.take_while(_BARE if dialect.has_bare_strings else _SCALAR)
    text = text.strip()
    if not _write_scalar(text, w):
        if not (dialect.has_bare_strings and text):
            shown = text or (yield from p.peek())
            raise Broken(f"{shown[:40]!r} is not a value")
        w.string(text)
    if p.is_at_end:
        raise Broken("the text ended inside a value")


def _write_scalar(text: str, w: JsonWriter) -> bool:
    if (word := _WORDS.get(text)) is not None:
        w.literal(word)
    elif _NUMBER.match(text):
        w.number(text)
    elif _PYTHON_NUMBER.match(text) and (number := _python_number(text)) is not None:
        w.number(number)
    else:
        return False
    return True


def _python_number(text: str) -> str | None:
    try:
        if text.lstrip("+-")[:2].lower() == "0x":
            return str(int(text, 16))
        if re.fullmatch(r"[+-]?[\d_]+", text):
            return str(int(text))
        value = float(text)
    except ValueError:  # misplaced underscores, leading zeros, or more digits than Python converts
        return None
    return repr(value) if math.isfinite(value) else None


def _read_key(p: Machine, w: JsonWriter, dialect: Dialect) -> Steps[None]:
    w.key((yield from read_key(p, dialect)))


def read_key(p: Machine, dialect: Dialect = JSON) -> Steps[str]:
    """An object's key and the colon behind it."""
    yield from p.skip_space()
    if (yield from p.peek()) in ("'", '"') or (yield from _at_quote(p, dialect)):
        key = yield from read_whole_string(p, dialect)
    else:
        key = yield from p.take_while(_KEY)
        if not key:
            raise Broken("the text ended before a key" if p.is_at_end else "expected a key")
    yield from p.skip_space()
    yield from p.expect(":")
    return key


def read_whole_string(p: Machine, dialect: Dialect = JSON) -> Steps[str]:
    """A quoted string's decoded content."""
    parts: list[str] = ['"']
    yield from read_string(p, JsonWriter(parts.append), dialect)
    return str(json.loads("".join(parts) + '"'))


class _Reader(Machine):
    """Reads a text that is here whole."""

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.is_value = False
        self._dialect = dialect

    def run(self) -> Steps[None]:
        writer = JsonWriter(self.parts.append)
        try:
            yield from read_value(self, writer, self._dialect)
        except Broken:
            pass
        yield from self.skip_space()
        self.is_value = writer.is_complete and self.is_at_end


def to_json(text: str, dialect: Dialect = PYTHON) -> str | None:
    """`text` as strict JSON; None when it is not one whole value."""
    reader = _Reader(dialect)
    reader.feed(text)
    reader.finish()
    return "".join(reader.parts) if reader.is_value else None
