"""Tokens to output events for one request: detokenizer, stop strings, parser, logprobs, counts. Event loop only.

    token ids ─► text ─► (stop strings hold back) ─► text that may be shown ─► parser ─► events

Several tokens at a time become one delta. Only where tokens must be told apart (stop strings, logprobs) are they fed
one by one. The engine is not known here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from vllm_mlx.engine.markers import Marker, match_of
from vllm_mlx.engine.step import TokenLogprobs
from vllm_mlx.generation.detokenizer import Detokenizer, TokenTable
from vllm_mlx.generation.events import LogprobEntry, LogprobsDelta, OutputEvent
from vllm_mlx.generation.stops import StopMatcher
from vllm_mlx.parsers.events import (
    ParserEvent,
    ParserNote,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallEnded,
    ToolCallStarted,
)
from vllm_mlx.parsers.pipeline import OutputParser


class ReasoningCounter:
    """Counts the tokens between the markers of reasoning, the markers themselves not."""

    def __init__(self, start: Marker, end: Marker, *, starts_open: bool) -> None:
        self._start, self._end = match_of(start), match_of(end)
        self._markers = start, end
        self._is_open = starts_open
        self.num_tokens = 0

    def feed(self, token_ids: Iterable[int]) -> None:
        for token_id in token_ids:
            self.num_tokens += self._is_open
            if self._is_open and self._end.feed(token_id):
                self.num_tokens -= self._end.num_tokens
                self._is_open = False
            elif not self._is_open:
                self._is_open = self._start.feed(token_id)

    def close(self) -> None:
        """Something other than reasoning was said: it is over, with or without a marker."""
        self._is_open = False
        self._start, self._end = map(match_of, self._markers)


@dataclass(slots=True)
class _PendingLogprob:
    """An entry whose text may not be shown yet. `start` and `end` count characters of the whole text."""

    entry: LogprobEntry
    start: int
    end: int | None


class OutputAssembler:
    """One request's way from tokens to events.

    `is_over` turns True when the text itself ended the answer: a stop string was found (`stop_sequence`), or the one
    tool call that is allowed is complete. Nothing may be fed after that.
    """

    def __init__(
        self,
        table: TokenTable,
        *,
        skip: frozenset[int] = frozenset(),
        stops: StopMatcher | None = None,
        parser: OutputParser | None = None,
        reasoning: ReasoningCounter | None = None,
        wants_logprobs: bool = False,
        allows_parallel_calls: bool = True,
    ) -> None:
        self._table = table
        self._skip = skip
        self._detokenizer: Detokenizer = table.new(skip)
        self._stops = stops
        self._parser = parser
        self._reasoning = reasoning
        self._wants_logprobs = wants_logprobs
        self._allows_parallel_calls = allows_parallel_calls
        self._pending: list[_PendingLogprob] = []
        self._ready: list[LogprobEntry] = []
        self._num_characters = 0  # detokenized
        self._num_shown = 0  # of these, passed on to the parser
        self.num_tokens = 0
        self._num_calls = 0
        self.num_complete_calls = 0
        self.stop_sequence: str | None = None
        self.is_over = False
        self.notes: list[str] = []

    @property
    def is_inside_call(self) -> bool:
        """A tool call was begun and has not come to its end."""
        return self._num_calls > self.num_complete_calls

    @property
    def num_reasoning_tokens(self) -> int:
        return self._reasoning.num_tokens if self._reasoning is not None else 0

    def feed(
        self, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs] = (), stop_token_id: int | None = None
    ) -> list[OutputEvent]:
        """What the tokens let be said. A stop token counts; it is text only where the parser knows it."""
        text_ids = token_ids
        if (
            stop_token_id is not None
            and token_ids
            and token_ids[-1] == stop_token_id
            and not self._keeps(stop_token_id)
        ):
            text_ids = token_ids[:-1]
        if self._stops is None and not self._wants_logprobs:
            self.num_tokens += len(token_ids)
            if self._reasoning is not None:
                self._reasoning.feed(text_ids)
            return self._parse(self._detokenizer.feed(text_ids))
        events: list[OutputEvent] = []
        for i, token_id in enumerate(text_ids):
            events += self._feed_one(token_id, logprobs[i] if i < len(logprobs) else None)
            if self.is_over:
                return events
        self.num_tokens += len(token_ids) - len(text_ids)
        return events

    def finish(self) -> list[OutputEvent]:
        """No more tokens: what was held back is decided now."""
        if self.is_over:
            return self._end_parser()
        events = self._show(self._detokenizer.flush())
        if not self.is_over and self._stops is not None:
            events += self._release(self._stops.flush(), is_last=True)
        elif not self.is_over:
            events += self._release("", is_last=True)
        return events + self._end_parser()

    # ── one token at a time ─────────────────────────────────────────────────────────────────────────────────────────

    def _feed_one(self, token_id: int, logprob: TokenLogprobs | None) -> list[OutputEvent]:
        self.num_tokens += 1
        if self._reasoning is not None:
            self._reasoning.feed((token_id,))
        start = self._num_characters
        text = self._detokenizer.feed((token_id,))
        self._num_characters += len(text)
        if not self._detokenizer.is_holding:
            for waiting in self._pending:
                waiting.end = self._num_characters if waiting.end is None else waiting.end
        if self._wants_logprobs and logprob is not None and token_id not in self._skip:
            end = None if self._detokenizer.is_holding else self._num_characters
            self._pending.append(_PendingLogprob(self.entry(logprob), start, end))
        return self._show(text)

    def _show(self, text: str) -> list[OutputEvent]:
        if self._stops is None:
            return self._release(text)
        match = self._stops.feed(text)
        if match.stop is None:
            return self._release(match.text)
        self.stop_sequence = match.stop
        self.is_over = True
        shown = self._num_shown + len(match.text)
        self._pending = [p for p in self._pending if p.start < shown]
        return self._release(match.text, is_last=True)

    def _release(self, text: str, *, is_last: bool = False) -> list[OutputEvent]:
        """Pass text on that may be shown, after the logprobs of its tokens."""
        self._num_shown += len(text)
        if self._wants_logprobs:
            num_ready = 0
            for pending in self._pending:
                if not is_last and (pending.end is None or pending.end > self._num_shown):
                    break
                num_ready += 1
            self._ready += [p.entry for p in self._pending[:num_ready]]
            del self._pending[:num_ready]
        return self._parse(text)

    # ── the parser ──────────────────────────────────────────────────────────────────────────────────────────────────

    def _parse(self, text: str) -> list[OutputEvent]:
        if not text:
            return []
        return self._emit(self._parser.feed(text) if self._parser is not None else [TextDelta(text)])

    def _end_parser(self) -> list[OutputEvent]:
        events = self._emit(self._parser.finish() if self._parser is not None else [])
        if self._ready:
            events.append(LogprobsDelta(tuple(self._ready)))
            self._ready.clear()
        return events

    def _emit(self, parsed: Sequence[ParserEvent]) -> list[OutputEvent]:
        events: list[OutputEvent] = []
        for event in parsed:
            if not self._allows_parallel_calls and self.num_complete_calls:
                break
            events.append(event)
            self._num_calls += isinstance(event, ToolCallStarted)
            match event:
                case ToolCallEnded(is_complete=True):
                    self.num_complete_calls += 1
                    self.is_over = self.is_over or not self._allows_parallel_calls
                case ParserNote():
                    self.notes.append(event.reason)
                case TextDelta() | ToolCallStarted() if self._reasoning is not None:
                    self._reasoning.close()
        if self._ready and any(not isinstance(e, ParserNote) for e in events):
            events.insert(0, LogprobsDelta(tuple(self._ready)))
            self._ready.clear()
        return merged(events)

    def _keeps(self, token_id: int) -> bool:
        return self._parser is not None and self._parser.keeps(self._table.token_text(token_id))

    # ── logprobs ────────────────────────────────────────────────────────────────────────────────────────────────────

    def entry(self, logprob: TokenLogprobs) -> LogprobEntry:
        table = self._table
        return LogprobEntry(
            table.token_text(logprob.token_id),
            table.token_bytes(logprob.token_id),
            logprob.token_id,
            logprob.logprob,
            tuple((table.token_text(i), table.token_bytes(i), value, i) for i, value in logprob.top),
        )


def merged(events: list[OutputEvent]) -> list[OutputEvent]:
    """Neighbouring deltas of one kind become one."""
    if len(events) < 2:
        return events
    out: list[OutputEvent] = []
    for event in events:
        last = out[-1] if out else None
        match last, event:
            case TextDelta(), TextDelta():
                out[-1] = TextDelta(last.text + event.text)
            case ReasoningDelta(), ReasoningDelta():
                out[-1] = ReasoningDelta(last.text + event.text)
            case ToolCallDelta(), ToolCallDelta() if last.index == event.index:
                out[-1] = ToolCallDelta(last.index, last.arguments + event.arguments)
            case LogprobsDelta(), LogprobsDelta():
                out[-1] = LogprobsDelta(last.entries + event.entries)
            case _:
                out.append(event)
    return out
