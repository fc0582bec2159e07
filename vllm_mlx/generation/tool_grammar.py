"""The grammar of tool calls: a format's envelope around arguments that fit the tools' schemas, as Lark text.

    required, named   one or more calls and nothing else
    auto              free text; where it opens the envelope, a call of a tool of the request with its arguments

Here is only the writing; `grammar.py` decides and compiles, `tool_values.py` writes arguments that are not JSON.
Worker threads; pure functions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vllm_mlx.parsers.tool_parser import Envelope

ANY_TEXT = r"/(.|\n)*/"


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """Tokens that a grammar must name by id, because text does not spell them: ids by text; those that end a turn."""

    ids: Mapping[str, int]
    stop_ids: frozenset[int] = frozenset()

    def atoms(self, text: str) -> list[str]:
        """Text as a sequence of Lark strings and token ids."""
        return [f"<[{self.ids[p]}]>" if p in self.ids else json.dumps(p) for p in self.pieces(text)]

    def pieces(self, text: str) -> list[str]:
        """Text cut at special tokens, the longest that fits first."""
        names = sorted((name for name in self.ids if name and name in text), key=len, reverse=True)
        return (
            [p for p in re.split("(" + "|".join(map(re.escape, names)) + ")", text) if p]
            if names
            else [text][: bool(text)]
        )

    def others(self, *excluded: int) -> str | None:
        """An atom for any special token but these and those that end a turn."""
        left = sorted(set(self.ids.values()) - self.stop_ids - set(excluded))
        return f"<[{','.join(map(str, left))}]>" if left else None


class LarkWriter:
    """Collects rules; gives out names for them."""

    def __init__(self, special: SpecialTokens) -> None:
        self.special = special
        self._rules: dict[str, str] = {}
        self._terminals: dict[tuple[str, str], str] = {}

    def text(self, text: str) -> str:
        """A Lark expression for a text, special tokens by id."""
        return " ".join(self.special.atoms(text))

    def add(self, stem: str, expression: str = "", options: str = "") -> str:
        """A new rule (upper-case stems make terminals); without an expression only its name is taken, see `define`."""
        name = f"{stem}_{len(self._rules)}"
        self._rules[name] = f"{name}{options}: {expression}"
        return name

    def define(self, name: str, expression: str) -> None:
        self._rules[name] = f"{name}: {expression}"

    def text_until(self, end: str, without: Sequence[str] = ()) -> str:
        """Text up to and including the first `end`, that contains none of the texts of `without`."""
        pieces = self.special.pieces(end)
        is_special = [piece in self.special.ids for piece in pieces]
        spelled = [text for text in without if text and not any(name in text for name in self.special.ids)]
        text = ANY_TEXT
        if spelled:
            text = self._terminal("TEXT_WITHOUT", rf"{text} & ~/(.|\n)*({'|'.join(map(_regex, spelled))})(.|\n)*/")
        if not any(is_special):
            return self.add("text_until", f"{text} {json.dumps(end)}" if end else text, "[lazy]")
        first = is_special.index(True)
        before = "".join(pieces[:first])
        text = self._terminal("TEXT_BEFORE", f"{text} {json.dumps(before)}" if before else text)
        return join(text if before else f"{text}?", self.text("".join(pieces[first:])))

    def _terminal(self, stem: str, expression: str) -> str:
        """A terminal, the same one for the same expression."""
        if (stem, expression) not in self._terminals:
            self._terminals[stem, expression] = self.add(stem, expression)
        return self._terminals[stem, expression]

    def lark(self) -> str:
        return "%llguidance {}\n" + "\n".join(self._rules.values()) + "\n"


def join(*parts: str) -> str:
    """A sequence; an empty one is the empty string."""
    return " ".join(part for part in parts if part) or '""'


def any_of(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else "(" + " | ".join(parts) + ")"


def _regex(text: str) -> str:
    """A text as a regex inside `/.../`."""
    return re.escape(text).replace("/", r"\/").replace("\n", "n")


class CallGrammar:
    """Writes the grammar of one request's calls: `bodies` are Lark expressions for each tool's arguments."""

    def __init__(self, writer: LarkWriter, envelope: Envelope, names: Sequence[str], bodies: Sequence[str]) -> None:
        self._writer = writer
        self._envelope = envelope
        self._names = [json.dumps(n)[1:-1] if envelope.style == "json" else n for n in names]
        self._bodies = bodies

    def required(self, *, is_parallel: bool) -> str:
        """Calls and nothing else."""
        self._writer.define("start", self._calls(is_parallel))
        return self._writer.lark()

    def or_document(self, document: str, *, is_parallel: bool) -> str:
        """Calls, or an answer that is a document of another grammar."""
        self._writer.define("start", f"document | {self._calls(is_parallel)}")
        self._writer.define("document", document)
        return self._writer.lark()

    def automatic(self, *, is_parallel: bool) -> str:
        """Free text, in which whatever opens a call must be one."""
        opening = self._envelope.open + self._envelope.begin
        stripped = opening.lstrip()
        trigger = max((t for t in self._envelope.triggers if t and stripped.startswith(t)), key=len, default=None)
        if trigger is None:
            self._writer.define("start", f"not_a_call | {self._calls(is_parallel)}")
            self._writer.define("not_a_call", self._text_that_opens_no_call())
            return self._writer.lark()
        calls = self._calls(is_parallel, num_written=len(opening) - len(stripped) + len(trigger))
        free, head = self._free_text(trigger)
        # Without parallel calls the answer ends behind the call, or a second one could follow in the text.
        self._writer.define("segment", f"{head} {calls}")
        self._writer.define("start", f"segment* {free}" if is_parallel else f"segment | {free}")
        return self._writer.lark()

    def _calls(self, is_parallel: bool, num_written: int = 0) -> str:
        """The calls up to `close`; the first characters of them may have been written already."""
        e = self._envelope
        first = self._writer.add("call", self._named((e.open + e.begin)[num_written:], is_first=True))
        if not is_parallel:
            return join(first, self._writer.text(e.close))
        another = self._writer.add("call", self._named(e.separator + e.begin, is_first=False))
        return join(first, f"{another}*", self._writer.text(e.close))

    def _named(self, before: str, *, is_first: bool) -> str:
        """NAME middle ARGUMENTS end, one alternative per tool, with what stands before.

        All up to the arguments is one string: only so can the lexer choose late between a call and text that is none.
        """
        e, text = self._envelope, self._writer.text
        alternatives = []
        for name, body in zip(self._names, self._bodies, strict=True):
            if e.is_counted and not is_first:
                head = join(text(f"{before}{name}:"), "/[1-9][0-9]*/", text(e.middle))
            else:
                head = text(before + name + (":0" if e.is_counted else "") + e.middle)
            alternatives.append(join(head, body, text(e.end)))
        return any_of(alternatives)

    def _free_text(self, trigger: str) -> tuple[str, str]:
        """(text that opens no call, such a text and then the trigger).

        Two terminals of text never meet, or the second could go on where the first was forbidden to.
        """
        special, writer = self._writer.special, self._writer
        pieces = special.pieces(trigger)
        place = next((i for i, piece in enumerate(pieces) if piece in special.ids), None)
        token = None if place is None else special.ids[pieces[place]]
        others = special.others() if token is None else special.others(token)
        text = writer.add("TEXT", r"/(.|\n)+/")
        kinds = [f"{others} {text}?"] if others else []
        if place == 0 and len(pieces) > 1 and pieces[1] not in special.ids:
            # The token opens other things too; what may not follow it then is what follows it in the trigger.
            other = writer.add("OTHER_TEXT", rf"/(.|\n)*/ & ~/{_regex(pieces[1])}(.|\n)*/")
            kinds.append(f"<[{token}]> {other}")
        free = writer.add("free", join(f"{text}?", f"({' | '.join(kinds)})*" if kinds else ""))
        if place == 0:
            return free, join(free, writer.text(trigger))
        before = f"({text}? {others})*" if others else ""
        return free, join(before, writer.text_until(trigger))

    def _text_that_opens_no_call(self) -> str:
        """For envelopes that only their whole opening tells from text; white space in it is anything."""
        e = self._envelope
        opening = e.open + e.begin
        if opening.strip() in ("", "[", "{"):
            names = "|".join(_regex(name) for name in self._names)
            spelled = f"{_loose(opening)}({names}){_loose(e.middle)}"
        else:
            spelled = _loose(opening)
        return self._writer.add("NOT_A_CALL", rf"/(.|\n)*/ & ~/\s*{spelled}(.|\n)*/")


def _loose(text: str) -> str:
    """A regex for a text with any white space around its punctuation."""
    tokens = re.findall(r"\w+|[^\w\s]", text)
    return r"\s*".join(_regex(token) for token in tokens)
