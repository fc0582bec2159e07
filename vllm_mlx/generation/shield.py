"""Keeps what people and tools wrote from being read as control tokens.

A file that a tool has read may hold the text `<|im_end|>`; encoded as the token of that name it would end the turn.
So such texts are marked before the template sees them (a noncharacter behind their first character), and the rendered
prompt is cut at the marks and encoded in pieces, none of which is a control token. System turns are the developer's
own words and stay as they are; so does an assistant turn that is to be continued. Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace

from vllm_mlx.generation.request import ChatMessage, TextPart

MARK = "\ufdd0"
"""A noncharacter: Unicode reserves it for uses like this one, and no text should hold it."""


class Shield:
    """For one tokenizer; `special` are the texts of its control tokens."""

    def __init__(self, special: Iterable[str]) -> None:
        texts = sorted((t for t in special if len(t) > 1), key=len, reverse=True)
        self._pattern = re.compile("|".join(re.escape(t) for t in texts)) if texts else None

    def guard(self, messages: Sequence[ChatMessage], *, is_continued: bool = False) -> tuple[ChatMessage, ...]:
        """The messages with control texts marked."""
        last = len(messages) - 1
        return tuple(
            m if m.role == "system" or (is_continued and i == last) else self._guard_message(m)
            for i, m in enumerate(messages)
        )

    def _guard_message(self, message: ChatMessage) -> ChatMessage:
        parts = tuple(TextPart(self.mark(p.text)) if isinstance(p, TextPart) else p for p in message.parts)
        calls = tuple(replace(c, arguments=self.mark(c.arguments)) for c in message.tool_calls)
        reasoning = self.mark(message.reasoning) if message.reasoning else message.reasoning
        return replace(message, parts=parts, tool_calls=calls, reasoning=reasoning)

    def mark(self, text: str) -> str:
        text = text.replace(MARK, "")
        return self._pattern.sub(lambda m: m[0][0] + MARK + m[0][1:], text) if self._pattern else text


def pieces(text: str) -> list[str]:
    """A rendered prompt cut at the marks."""
    return text.split(MARK)


def plain(text: str, instead: str = "") -> str:
    """A rendered prompt without marks."""
    return text.replace(MARK, instead)
