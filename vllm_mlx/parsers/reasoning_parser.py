"""The reasoning parser: generated text in, reasoning and content out. What differs between formats is in `reasoning/`.

Reasoning stands at the beginning of an answer, or of a line: a start marker in mid-sentence is a model talking about
the marker. Formats whose markers no text can contain (control tokens) accept them anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mlx.parsers.events import ReasoningDelta, TextDelta
from vllm_mlx.parsers.machine import Machine, Markers, Steps
from vllm_mlx.parsers.signs import Sign


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The texts around reasoning; `forced_end` is what to write in order to end it early."""

    start: str
    end: str
    forced_end: str


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """One format. The first pair is the canonical one; all pairs are understood.

    `dropped`: markers around the answer itself, which are no text. `needs_special_tokens`: the markers are special
    tokens, which the detokenizer must not drop.
    """

    name: str
    pairs: tuple[tuple[str, str], ...]
    aliases: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    forced_end: str = ""
    is_anywhere: bool = False
    needs_special_tokens: bool = True
    signs: tuple[Sign, ...] = ()

    @property
    def markers(self) -> ReasoningMarkers:
        start, end = self.pairs[0]
        return ReasoningMarkers(start, end, self.forced_end or end)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for pair in self.pairs for text in pair) + self.dropped

    def opens_in(self, prompt: str) -> bool:
        """Whether the rendered prompt ends inside reasoning."""
        start = max(prompt.rfind(s) for s, _ in self.pairs)
        end = max(prompt.rfind(e) for _, e in self.pairs)
        return start > end and not any(c.isalnum() for c in _behind(prompt, start, self.pairs))


def _behind(prompt: str, start: int, pairs: tuple[tuple[str, str], ...]) -> str:
    """What follows the marker at `start`; the template writes nothing readable there, a user's message would."""
    marker = max((s for s, _ in pairs if prompt.startswith(s, start)), key=len)
    return prompt[start + len(marker) :]


class ReasoningParser(Machine):
    """One request's reasoning parser.

    `starts_open`: the prompt has opened the reasoning. `implicit_ends`: openers of tool calls; one inside reasoning
    ends it and belongs to the content.
    """

    def __init__(
        self, format: ReasoningFormat, *, starts_open: bool = False, implicit_ends: Sequence[str] = ()
    ) -> None:
        super().__init__()
        self.format = format
        self._open = format.pairs[0] if starts_open else None
        self._implicit_ends = tuple(implicit_ends)
        self._ends = {start: end for start, end in format.pairs}
        self._starts = Markers((*self._ends, *format.dropped))
        self._has_text = False
        self._line_is_empty = True

    @property
    def is_reasoning_open(self) -> bool:
        return self._open is not None

    def run(self) -> Steps[None]:
        if self._open is None:
            yield from self._stray_end()
        while True:
            if self._open is not None:
                if not (yield from self._reasoning(self._open)):
                    return
            elif not (yield from self._content()):
                return

    def _reasoning(self, pair: tuple[str, str]) -> Steps[bool]:
        """Everything up to the end marker; False when the text ended."""
        start, end = pair
        yield from self.skip_space()
        if (yield from self.accept(start)) is not None:  # opened by the prompt, and once more by the model
            yield from self.skip_space()
        ends = self._ends.values()
        found = yield from self.until(Markers((*ends, *self._implicit_ends)), self._say_reasoning, trim=True)
        self._open = None
        if found is None:
            return False
        if found not in ends:
            self.note(f"reasoning ended at {found!r} without {end!r}")
            self._pos -= len(found)
        if not self._has_text:
            yield from self.skip_space()
        self._line_is_empty = True
        return True

    def _content(self) -> Steps[bool]:
        """Text up to a start marker that counts; False when the text ended."""
        found = yield from self.until(self._starts, self._say_text)
        if found is None:
            return False
        if found in self.format.dropped:
            return True
        if self.format.is_anywhere or self._line_is_empty:
            self._open = (found, self._ends[found])
        else:
            self._say_text(found)
        return True

    def _stray_end(self) -> Steps[None]:
        """An end marker that opens the answer: the prompt closed the reasoning, and the model did once more."""
        ends = tuple(self._ends.values())
        self._keep = self._pos
        yield from self.skip_space()
        if (yield from self.accept(*ends)) is not None:
            self.note("the answer began with the end of a reasoning that was not open")
            yield from self.skip_space()
        else:
            self._pos = self._keep
        self._keep = None

    def _say_reasoning(self, text: str) -> None:
        self.emit(ReasoningDelta(text))

    def _say_text(self, text: str) -> None:
        self._has_text = self._has_text or not text.isspace()
        last_line = text.rpartition("\n")[2]
        is_blank = not last_line or last_line.isspace()
        self._line_is_empty = is_blank and ("\n" in text or self._line_is_empty)
        self.emit(TextDelta(text))
