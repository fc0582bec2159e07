"""One parser for a whole answer: reasoning, then tool calls, then content. This is what `generation` uses.

`build` makes it from names; `feed` takes text as it is generated, `finish` ends it; both return events.
"""

from __future__ import annotations

from collections.abc import Sequence

from vllm_mlx.parsers import discover
from vllm_mlx.parsers.events import ParserEvent, TextDelta
from vllm_mlx.parsers.harmony import HarmonyParser
from vllm_mlx.parsers.machine import Machine
from vllm_mlx.parsers.reasoning import harmony as harmony_reasoning
from vllm_mlx.parsers.reasoning_parser import ReasoningFormat, ReasoningMarkers, ReasoningParser
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import Envelope, ToolFormat, ToolParser
from vllm_mlx.parsers.tools import harmony as harmony_tools


class OutputParser:
    """One request's parser. Text in, events out; never raises. Without formats, all text is content.

    A harmony parser reads everything and takes the place of both.
    """

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None = None,
        tools: ToolParser | None = None,
        harmony: HarmonyParser | None = None,
        reasoning_format: ReasoningFormat | None = None,
    ) -> None:
        self._reasoning = reasoning
        self._tools = harmony or tools
        self._harmony = harmony
        self._machine: Machine | None = reasoning or self._tools  # the reasoning parser hands content on to the tools'
        self._reasoning_format = reasoning_format or (reasoning.format if reasoning is not None else None)
        self._has_tools = tools is not None or (harmony is not None and bool(harmony.tools))

    def feed(self, text: str) -> list[ParserEvent]:
        if self._machine is not None:
            return self._machine.feed(text)
        return [TextDelta(text)] if text else []

    def finish(self) -> list[ParserEvent]:
        return self._machine.finish() if self._machine is not None else []

    def keeps(self, token_text: str) -> bool:
        """Whether a special token is part of a marker, and must be in the text that is fed; others must not."""
        return any(token_text in marker for marker in self._markers())

    @property
    def is_reasoning_open(self) -> bool:
        """The text fed so far ends inside reasoning; a structured answer starts when this turns False."""
        if self._harmony is not None:
            return self._harmony.is_reasoning_open
        return self._reasoning is not None and self._reasoning.is_reasoning_open

    @property
    def reasoning_markers(self) -> ReasoningMarkers | None:
        """The texts around reasoning, for a budget; None without a reasoning format."""
        return self._reasoning_format.markers if self._reasoning_format is not None else None

    @property
    def tool_format(self) -> ToolFormat | None:
        """The format calls are looked for in; None when the request has no tools."""
        return self._tools.format if self._tools is not None and self._has_tools else None

    @property
    def envelope(self) -> Envelope | None:
        """How the tool format writes calls, for a grammar; None when there is none or it cannot be constrained."""
        return self.tool_format.envelope if self.tool_format is not None else None

    @property
    def num_calls(self) -> int:
        """Tool calls begun so far."""
        return self._tools.num_calls if self._tools is not None else 0

    @property
    def needs_special_tokens(self) -> bool:
        """Some markers are special tokens; `keeps` tells which must stay in the text."""
        formats = (self._reasoning_format, self._tools.format if self._tools is not None else None)
        return any(format is not None and format.needs_special_tokens for format in formats)

    def _markers(self) -> tuple[str, ...]:
        reasoning = self._reasoning_format.texts if self._reasoning_format is not None else ()
        tools = (*self._tools.format.openers, *self._tools.format.markers) if self._tools is not None else ()
        return (*reasoning, *tools)


def build(
    *,
    tool_format: str | None = None,
    reasoning_format: str | None = None,
    tools: Sequence[ToolSpec] = (),
    starts_open: bool = False,
) -> OutputParser:
    """The parser for one request. Format names are any that `discover` knows; KeyError for others.

    Tool calls are looked for only when the request has tools. `starts_open`: the rendered prompt has opened the
    reasoning (see `prompt_opens_reasoning`).
    """
    tool = discover.find_tool_format(tool_format) if tool_format else None
    reasoning = discover.find_reasoning_format(reasoning_format) if reasoning_format else None
    if tool is harmony_tools.FORMAT or reasoning is harmony_reasoning.FORMAT:
        parser = HarmonyParser(harmony_tools.FORMAT, tools if tool is harmony_tools.FORMAT else ())
        return OutputParser(harmony=parser, reasoning_format=harmony_reasoning.FORMAT)
    tool_parser = ToolParser(tool, tools) if tool is not None and tools else None
    reasoning_parser = None
    if reasoning is not None:
        ends = tool.ends_reasoning if tool is not None and tools else ()
        reasoning_parser = ReasoningParser(reasoning, starts_open=starts_open, implicit_ends=ends, content=tool_parser)
    return OutputParser(reasoning=reasoning_parser, tools=tool_parser)


def prompt_opens_reasoning(reasoning_format: str | None, prompt: str) -> bool:
    """Whether a rendered prompt ends inside reasoning, so that the answer starts there."""
    return reasoning_format is not None and discover.find_reasoning_format(reasoning_format).opens_in(prompt)
