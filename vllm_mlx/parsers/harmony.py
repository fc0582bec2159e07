"""Harmony, gpt-oss' response format, read by one machine: every part of an answer is a message on a channel.

    <|channel|>analysis<|message|>R<|end|>                                                          reasoning
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>     tool call
    <|start|>assistant<|channel|>final<|message|>C<|return|>                                             content

Commentary without a recipient is a preamble for the reader: content. Text outside any message is content too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from vllm_mlx.parsers.events import ReasoningDelta
from vllm_mlx.parsers.machine import Broken, Markers, Steps
from vllm_mlx.parsers.schema import ToolSpec
from vllm_mlx.parsers.tool_parser import ToolFormat, ToolParser
from vllm_mlx.parsers.values import read_value

_START, _CHANNEL, _MESSAGE, _CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
_ENDS = ("<|end|>", "<|return|>", "<|call|>")
_ANY = Markers((_START, _CHANNEL, _MESSAGE, _CONSTRAIN, *_ENDS))
_BODY_ENDS = Markers((*_ENDS, _START, _CHANNEL))
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_WORDS = frozenset({"assistant", "analysis", "commentary", "final", "json", "code"})
_MAX_HEADER = 500


class HarmonyParser(ToolParser):
    """One request's parser for reasoning, tool calls and content together."""

    def __init__(self, format: ToolFormat, tools: Sequence[ToolSpec] = ()) -> None:
        super().__init__(format, tools)
        self._is_before_answer = True

    @property
    def is_reasoning_open(self) -> bool:
        """The answer's own message has not begun: headers and analysis count as reasoning."""
        return self._is_before_answer

    def run(self) -> Steps[None]:
        while True:
            found = yield from self.until(_ANY, self._say_stray, trim=True)
            if found is None:
                return
            if found in (*_ENDS, _CONSTRAIN):
                continue  # a stray one says nothing
            self._mark(self._marker_at)
            try:
                yield from self._read_message(found)
            except Broken as broken:
                yield from self._recover(broken.reason)
            self._keep = None

    def _say_stray(self, text: str) -> None:
        if not text.isspace():
            self._is_before_answer = False
        self.say_text(text)

    def _read_message(self, marker: str) -> Steps[None]:
        header = ""
        while marker != _MESSAGE:
            part, marker = yield from self.collect_until(_MESSAGE, _CHANNEL, *_ENDS, limit=_MAX_HEADER)
            header += f" {part}"
            if marker in _ENDS:
                raise Broken("a message without a body")
        self._mark(self._pos)
        recipient = _RECIPIENT.search(header)
        words = _RECIPIENT.sub(" ", header).replace(_CONSTRAIN, " ").split()
        if unknown := set(words) - _WORDS:
            self.note(f"ignored {sorted(unknown)} in a message's header")
        if recipient is None or recipient[1] in ("all", "user"):
            yield from self._read_body(is_reasoning="analysis" in words)
        elif recipient[1] == "assistant":  # a tool's result that the model made up
            yield from self._read_body(is_reasoning=True)
        else:
            yield from self._read_call(recipient[1])

    def _read_body(self, is_reasoning: bool) -> Steps[None]:
        self._is_before_answer = is_reasoning
        self._keep = None
        found = yield from self.until(_BODY_ENDS, self._say_reasoning if is_reasoning else self.say_text)
        if found in (_START, _CHANNEL):
            self.unread(found)

    def _read_call(self, name: str) -> Steps[None]:
        """Arguments are JSON. Code for a built-in tool that the request does not have is shown as reasoning."""
        yield from self.skip_space()
        if not self.tools or (yield from self.peek()) != "{":
            if (yield from self.looking_at(*_ENDS)) is None or not self.tools:
                self.note(f"a message to {name!r} that is no tool call")
                yield from self._read_body(is_reasoning=True)
                return
            self.begin_call(name)
        else:
            yield from read_value(self, self.begin_call(name))
        self._is_before_answer = False
        self.end_call()
        found = yield from self.until(_BODY_ENDS, self.say_text, trim=True)
        if found in (_START, _CHANNEL):
            self.unread(found)
        self._is_before_answer = True

    def _say_reasoning(self, text: str) -> None:
        self.emit(ReasoningDelta(text))
