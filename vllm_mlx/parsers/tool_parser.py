"""The tool parser: content text in, text and tool calls out. What differs between formats is in `tools/`.

A format says which markers open a call and reads what follows; this machine finds the markers, numbers the calls,
streams their arguments, and mends or returns what turns out broken:

    text  ──opener──►  format.read  ──done──►  text
                            └──Broken──►  call not yet begun: the opener becomes text, reading goes on behind it
                                          call begun: its arguments are closed, the rest is text; a note says why
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_mlx.parsers.events import TextDelta, ToolCallDelta, ToolCallEnded, ToolCallStarted
from vllm_mlx.parsers.json_writer import JsonWriter
from vllm_mlx.parsers.machine import Broken, Machine, Markers, Steps
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.signs import Sign

_MAX_NAME = 256
_SURPLUS = re.compile(r"[\s}\]\"`]")


@dataclass(frozen=True, slots=True)
class Envelope:
    """How a format writes calls, for a grammar around them.

        open  begin NAME middle ARGUMENTS end  (separator begin NAME middle ARGUMENTS end)*  close

    `style` says how ARGUMENTS are written: `json` (one JSON object), `tags` (for each parameter: parameter_begin KEY
    parameter_middle VALUE parameter_end; a string VALUE is raw text, any other is JSON), `python` (KEY=LITERAL, ...)
    or `gemma` (KEY:VALUE, ... where strings stand between `quote` marks). With `is_counted`, `:` and the call's number
    (from 0) stand between NAME and `middle`. `triggers`: texts that can only be the beginning of a call, for a grammar
    that leaves free text alone until one appears. `special_tokens`: markers above that are single tokens of the
    vocabulary in the models that use the format; a grammar must name them as tokens.
    `reasoning_end`: what ends the reasoning before a call, where it is not what ends it before an answer.
    """

    begin: str
    middle: str
    end: str
    open: str = ""
    close: str = ""
    separator: str = ""
    style: str = "json"
    parameter_begin: str = ""
    parameter_middle: str = ""
    parameter_end: str = ""
    quote: str = ""
    is_counted: bool = False
    triggers: tuple[str, ...] = ()
    special_tokens: tuple[str, ...] = ()
    reasoning_end: str = ""


class ToolFormat:
    """One format. Stateless: everything about a request is in the parser it is given.

    `openers` are the markers a call can begin with. `needs_special_tokens`: some markers are special tokens, which the
    detokenizer must not drop. `ends_reasoning`: openers that in reasoning mean that the model forgot to close it.
    `signs`: what in a template or a vocabulary tells that a model uses the format.
    """

    name: str = ""
    aliases: tuple[str, ...] = ()
    openers: tuple[str, ...] = ()
    markers: tuple[str, ...] = ()  # further markers, beside the openers
    needs_special_tokens: bool = False
    envelope: Envelope | None = None
    signs: tuple[Sign, ...] = ()

    @property
    def ends_reasoning(self) -> tuple[str, ...]:
        return self.envelope.triggers if self.envelope is not None else ()

    def read(self, p: ToolParser, opener: str) -> Steps[None]:
        """Read what follows an opener: one call, or several up to the format's closing marker."""
        raise NotImplementedError

    def read_start(self, p: ToolParser) -> Steps[None]:
        """Read a call that opens the answer without a marker. The default: there is none."""
        return
        yield


@dataclass(frozen=True, slots=True)
class _Call:
    index: int
    writer: JsonWriter


class ToolParser(Machine):
    """One request's tool parser."""

    def __init__(self, format: ToolFormat, tools: Sequence[ToolSpec] = ()) -> None:
        super().__init__()
        self.format = format
        self.tools = {tool.name: tool for tool in tools}
        self.num_calls = 0
        self._call: _Call | None = None
        self._retry_at = 0
        self._has_text = False
        self._is_behind_call = False
        self._is_inside_call = False
        self._deferred: list[str] = []
        self._openers = Markers(format.openers)

    @property
    def is_inside_call(self) -> bool:
        """The text fed so far ends inside a call, or what may be one."""
        return self._is_inside_call or self._call is not None

    # -- the program --------------------------------------------------------------------------------------------------

    def run(self) -> Steps[None]:
        self._mark(self._pos)
        yield from self._attempt(self.format.read_start(self))
        while True:
            if self._is_behind_call:
                yield from self._space_behind_call()
            opener = yield from self.until(self._openers, self.say_text, trim=True)
            if opener is None:
                return
            self._mark(self._marker_at)
            self._is_inside_call = True
            yield from self._attempt(self.format.read(self, opener))
            self._is_inside_call = False

    def _mark(self, start: int) -> None:
        """From here on the text may have to be returned; reading would go on at the present position."""
        self._keep = start
        self._retry_at = self._pos - start

    def _go_back(self) -> None:
        """To where reading goes on: behind the last call, `settle` or opener."""
        assert self._keep is not None
        self._pos = self._keep + self._retry_at

    def _attempt(self, steps: Steps[None]) -> Steps[None]:
        calls_before = self.num_calls
        try:
            yield from steps
            self._go_back()
        except Broken as broken:
            yield from self._recover(broken.reason)
        self._keep = None
        self._is_behind_call |= self.num_calls > calls_before

    def _recover(self, reason: str) -> Steps[None]:
        assert self._keep is not None
        if self._call is not None:
            yield from self._close_broken_call(self._call, reason)
            return
        self._go_back()
        text = self._buffer[self._keep : self._pos]
        if text and self.num_calls and self._ended and not self._buffer[self._pos :].strip():
            self.note(f"ignored {text.strip()!r} at the end")  # an opening tag written for a closing one
            self._pos = len(self._buffer)
            return
        if reason:
            self.note(f"{text.strip()!r} did not open a tool call: {reason}" if text else reason)
        if text:
            self.say_text(text)

    def _close_broken_call(self, call: _Call, reason: str) -> Steps[None]:
        """A closing marker that comes now says that the model was done: a bracket or two are missing, nothing else."""
        left_out = self._buffer[self._keep : self._pos].strip()
        self._mark(self._pos)
        yield from self.skip_space()
        surplus = yield from self.take_while(_SURPLUS)
        is_closed = (yield from self.accept_marker()) is not None
        if is_closed:
            left_out += surplus.strip()
            self._mark(self._pos)
        else:
            self._go_back()
        tail = f"; left out: {left_out!r}" if left_out else ""
        self.note(f"tool call {call.index} was closed early: {reason}{tail}")
        writer = call.writer
        self.end_call(is_complete=writer.is_complete or (is_closed and not writer.is_empty and not writer.lacks_value))

    def _space_behind_call(self) -> Steps[None]:
        """White space between calls belongs to the format; between two texts with a call between, it separates them."""
        self._is_behind_call = False
        self._keep = self._pos
        yield from self.skip_space()
        while (marker := (yield from self.accept_marker())) is not None:
            self.note(f"ignored {marker!r} behind a tool call")
            self._keep = self._pos
            yield from self.skip_space()
        is_before_call = bool(self.format.openers) and (yield from self.looking_at(*self.format.openers)) is not None
        space = self._buffer[self._keep : self._pos]
        self._keep = None
        if space and self._has_text and not is_before_call and not self.is_at_end:
            self.say_text(space)

    # -- for formats: saying ------------------------------------------------------------------------------------------

    def say_text(self, text: str) -> None:
        """Text for the reader; text inside a call waits until the call has ended."""
        if self._call is not None:
            self._deferred.append(text)
            return
        self._has_text = self._has_text or not text.isspace()
        self.emit(TextDelta(text))

    def begin_call(self, name: str, id: str | None = None) -> JsonWriter:
        """Announce a call; its arguments are written to what is returned."""
        name = self.known_name(name)
        if not name or len(name) > _MAX_NAME:
            raise Broken("a tool call without a usable name")
        index = self.num_calls
        self.num_calls += 1
        if self.tools and name not in self.tools:
            self.note(f"tool call {index} names {name!r}, which is not a tool of this request")
        self.emit(ToolCallStarted(index, name, id))

        def say(arguments: str) -> None:
            self.emit(ToolCallDelta(index, arguments))
            self._mark(self._pos)

        self._call = _Call(index, JsonWriter(say))
        self._mark(self._pos)
        return self._call.writer

    def end_call(self, *, is_complete: bool = True) -> None:
        """The call's arguments are all written, or as far as they came."""
        call, self._call = self._call, None
        assert call is not None
        call.writer.close()
        self.emit(ToolCallEnded(call.index, is_complete))
        self._mark(self._pos)
        deferred, self._deferred = self._deferred, []
        for text in deferred:
            self.say_text(text)

    def settle(self) -> None:
        """All text read so far is part of calls. What is read behind the last call or `settle` is given back."""
        self._mark(self._pos)

    def known_name(self, name: str) -> str:
        """The name as the request spells it: models add white space and `functions.`."""
        name = name.strip()
        short = name.removeprefix("functions.")
        return short if short in self.tools or name not in self.tools else name

    # -- for formats: reading -----------------------------------------------------------------------------------------

    def accept_marker(self) -> Steps[str | None]:
        """Consume one of the format's markers that is no opener, if one comes next."""
        openers, markers = self.format.openers, self.format.markers
        found = (yield from self.looking_at(*openers, *markers)) if markers else None
        if found is None or found in openers:
            return None
        self.skip(len(found))
        return found

    def read_close(self, *closers: str, unread: tuple[str, ...] = ()) -> Steps[None]:
        """Read up to a closing marker. What stands before it is text; a missing one is noted, not missed.

        Those of `unread` end the call too, but belong to what is around it.
        """
        yield from self.skip_space()
        junk = yield from self.take_while(_SURPLUS)
        if junk.strip():
            self.note(f"ignored {junk.strip()!r} behind a tool call")
        found = yield from self.until(Markers((*closers, *self.format.openers)), self.say_text, trim=True)
        if found is None:
            self.note(f"{closers[0]!r} is missing behind a tool call")
        elif found in unread or found not in closers:
            self.unread(found)
        self.settle()
