"""One parser for a whole answer: reasoning, then tool calls, then content. This is what `generation` uses.

`build` makes it from names; `feed` takes text as it is generated, `finish` ends it; both return events.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.parsers import discover
from vllm_mlx.parsers.events import ParserEvent, TextDelta
from vllm_mlx.parsers.reasoning_parser import ReasoningFormat, ReasoningMarkers, ReasoningParser
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import Envelope, ToolParser


class OutputParser:
    """One request's parser. Text in, events out; never raises. Without formats, all text is content.

    `is_reasoning_open`: the text fed so far ends inside reasoning (a structured answer starts when it is False).
    `reasoning_markers`: the texts around reasoning, for a budget; None without a reasoning format.
    `envelope`: how the tool format writes calls, for a grammar; None when there is none or it cannot be constrained.
    `num_calls`: tool calls begun so far.
    """

    def __init__(self, *, reasoning: ReasoningParser | None = None, tools: ToolParser | None = None) -> None:
        self._reasoning = reasoning
        self._tools = tools

    def feed(self, text: str) -> list[ParserEvent]:
        if self._reasoning is None:
            return self._content(text)
        return self._route(self._reasoning.feed(text))

    def finish(self) -> list[ParserEvent]:
        events = self._route(self._reasoning.finish()) if self._reasoning is not None else []
        return events + (self._tools.finish() if self._tools is not None else [])

    def keeps(self, token_text: str) -> bool:
        """Whether a special token is part of a marker, and must be in the text that is fed; others must not."""
        return any(token_text in marker for marker in self._markers())

    @property
    def is_reasoning_open(self) -> bool:
        return self._reasoning is not None and self._reasoning.is_reasoning_open

    @property
    def reasoning_markers(self) -> ReasoningMarkers | None:
        return self._reasoning.format.markers if self._reasoning is not None else None

    @property
    def envelope(self) -> Envelope | None:
        return self._tools.format.envelope if self._tools is not None else None

    @property
    def num_calls(self) -> int:
        return self._tools.num_calls if self._tools is not None else 0

    @property
    def needs_special_tokens(self) -> bool:
        """Some markers are special tokens; `keeps` tells which must stay in the text."""
        return (self._reasoning is not None and self._reasoning.format.needs_special_tokens) or (
            self._tools is not None and self._tools.format.needs_special_tokens
        )

    def _markers(self) -> tuple[str, ...]:
        reasoning = self._reasoning.format.texts if self._reasoning is not None else ()
        tools = (*self._tools.format.openers, *self._tools.format.markers) if self._tools is not None else ()
        return (*reasoning, *tools)

    def _route(self, events: list[ParserEvent]) -> list[ParserEvent]:
        routed: list[ParserEvent] = []
        for event in events:
            routed.extend(self._content(event.text) if isinstance(event, TextDelta) else (event,))
        return routed

    def _content(self, text: str) -> list[ParserEvent]:
        if self._tools is not None:
            return self._tools.feed(text)
        return [TextDelta(text)] if text else []


def build(
    *,
    tool_format: str | None = None,
    reasoning_format: str | None = None,
    tools: Sequence[ToolSpec] = (),
    starts_open: bool = False,
) -> OutputParser:
    """The parser for one request. Format names are any that `discover` knows, `auto` included.

    Tool calls are looked for only when the request has tools. `starts_open`: the rendered prompt has opened the
    reasoning (see `prompt_opens_reasoning`).
    """
    tool_parser = ToolParser(discover.find_tool_format(tool_format), tools) if tool_format and tools else None
    reasoning_parser = None
    if reasoning_format:
        ends = tool_parser.format.openers if tool_parser is not None and tool_parser.format.ends_reasoning else ()
        reasoning_parser = ReasoningParser(
            discover.find_reasoning_format(reasoning_format), starts_open=starts_open, implicit_ends=ends
        )
    return OutputParser(reasoning=reasoning_parser, tools=tool_parser)


def prompt_opens_reasoning(reasoning_format: str | None, prompt: str) -> bool:
    """Whether a rendered prompt ends inside reasoning, so that the answer starts there."""
    if not reasoning_format:
        return False
    format: ReasoningFormat = discover.find_reasoning_format(reasoning_format)
    return format.opens_in(prompt)
