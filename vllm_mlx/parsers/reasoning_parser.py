"""The reasoning parser: generated text in, reasoning and content out. What differs between formats is in `reasoning/`.

Reasoning stands at the beginning of an answer, or of a line: a start marker in mid-sentence is a model talking about
the marker. Formats whose markers no text can contain (control tokens) accept them anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mlx.parsers.events import ParserEvent, ReasoningDelta, TextDelta
from vllm_mlx.parsers.machine import Machine, Markers, Steps, coalesce
from vllm_mlx.parsers.signs import Sign
from vllm_mlx.parsers.tool_parser import ToolParser


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The texts around reasoning; `forced_end` is what to write in order to end it early.

    `end` is what the answer begins behind, `thought_end` what the thoughts end with; mostly they are one.
    """

    start: str
    end: str
    forced_end: str
    thought_end: str


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
    thought_end: str = ""
    is_anywhere: bool = False
    needs_special_tokens: bool = True
    signs: tuple[Sign, ...] = ()

    @property
    def markers(self) -> ReasoningMarkers:
        start, end = self.pairs[0]
        return ReasoningMarkers(start, end, self.forced_end or end, self.thought_end or end)

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


def _is_control_token(marker: str) -> bool:
    """No text that a reader may see contains it, so it means itself wherever it stands."""
    return marker.startswith(("<|", "<｜", "[TOOL"))


class ReasoningParser(Machine):
    """One request's reasoning parser.

    `starts_open`: the prompt has opened the reasoning. `content`: who reads the content; without one it is text.
    `implicit_ends`: openers of tool calls; one inside reasoning, on a line of its own, ends it and belongs to the
    content. Inside a tool call no marker of ours counts: it is part of an argument.
    """

    def __init__(
        self,
        format: ReasoningFormat,
        *,
        starts_open: bool = False,
        implicit_ends: Sequence[str] = (),
        content: ToolParser | None = None,
    ) -> None:
        super().__init__()
        self.format = format
        self._open_start = format.pairs[0][0] if starts_open else None
        self._content = content
        self._implicit_ends = frozenset(implicit_ends)
        self._end_texts = frozenset(end for _, end in format.pairs)
        starts = [start for start, _ in format.pairs]
        self._content_markers = Markers((*starts, *format.dropped))
        self._content_markers_and_end = Markers((*starts, *format.dropped, *self._end_texts))
        self._owes_end = False  # reasoning ended without its marker, which may still come
        self._reasoning_markers = Markers((*self._end_texts, *self._implicit_ends))
        self._has_text = False
        self._line_is_empty = True

    @property
    def is_reasoning_open(self) -> bool:
        return self._open_start is not None

    def finish(self) -> list[ParserEvent]:
        events = super().finish()
        return coalesce([*events, *(self._content.finish() if self._content is not None else ())])

    def run(self) -> Steps[None]:
        if self._open_start is None:
            yield from self._read_stray_end()
        while not self.is_at_end:
            if self._open_start is not None:
                yield from self._read_reasoning(self._open_start)
            else:
                yield from self._read_content()

    def _read_reasoning(self, start: str) -> Steps[None]:
        """Everything up to the end marker."""
        yield from self.skip_space()
        if (yield from self.accept(start)) is not None:  # opened by the prompt, and once more by the model
            yield from self.skip_space()
        self._line_is_empty = True
        while True:
            found = yield from self.until(self._reasoning_markers, self._say_reasoning, trim=True)
            if found is None:
                break
            space = self._space_before(found)
            if found in self._end_texts:
                break
            if _is_control_token(found) or self._line_is_empty or "\n" in space:
                self.note(f"reasoning ended at {found!r} without its end marker")
                self.unread(found)
                self._owes_end = True
                break
            self._say_reasoning(space + found)
        self._open_start = None
        self._line_is_empty = True
        if not self._has_text:
            yield from self._skip_blank_lines()

    def _read_content(self) -> Steps[None]:
        """Text up to a marker that counts."""
        markers = self._content_markers_and_end if self._owes_end else self._content_markers
        found = yield from self.until(markers, self._say_text, trim=True)
        if found is None:
            return
        space = self._space_before(found)
        if self._content is not None and self._content.is_inside_call:
            self._say_text(space + found)
        elif found in self.format.dropped:
            self._say_text(space)
        elif found in self._end_texts:
            self._owes_end = False
            self._say_text(space)
        elif self.format.is_anywhere or self._line_is_empty or "\n" in space:
            self._open_start = found
        else:
            self._say_text(space + found)

    def _space_before(self, marker: str) -> str:
        """White space that `until` trimmed before the marker it has just consumed."""
        return self._buffer[self._marker_at : self._pos - len(marker)]

    def _read_stray_end(self) -> Steps[None]:
        """An end marker that opens the answer: the prompt closed the reasoning, and the model did once more."""
        self._keep = self._pos
        yield from self.skip_space()
        if (yield from self.accept(*self._end_texts)) is not None:
            self.note("the answer began with the end of a reasoning that was not open")
            yield from self._skip_blank_lines()
        else:
            self._pos = self._keep
        self._keep = None

    def _skip_blank_lines(self) -> Steps[None]:
        """White space between reasoning and answer is no text, but an indent of the answer's first line is."""
        self._keep = self._pos
        yield from self.skip_space()
        line = self._buffer.rfind("\n", self._keep, self._pos)
        self._pos = self._pos if line < 0 else line + 1
        self._keep = None

    def _say_reasoning(self, text: str) -> None:
        self._line_is_empty = _ends_in_empty_line(text, self._line_is_empty)
        self.emit(ReasoningDelta(text))

    def _say_text(self, text: str) -> None:
        if not text:
            return
        self._has_text = self._has_text or not text.isspace()
        self._line_is_empty = _ends_in_empty_line(text, self._line_is_empty)
        if self._content is None:
            self.emit(TextDelta(text))
        else:
            self._events.extend(self._content.feed(text))


def _ends_in_empty_line(text: str, was_empty: bool) -> bool:
    last_line = text.rpartition("\n")[2]
    return (not last_line or last_line.isspace()) and ("\n" in text or was_empty)
