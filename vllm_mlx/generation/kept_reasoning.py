"""Reasoning of earlier turns, kept where a chat template would drop it.

Many templates write the reasoning of the last turn only. The turn before it was computed with its reasoning, so the
next prompt differs from what the cache holds from there on, and an agent's long turn is computed again. So each such
turn's words get a mark, and where the rendered text shows no reasoning before a mark, it is put there in the template's
own form. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm_mlx.generation.traits import Traits, Turn

_MARK = "\ufdd1"
"""A noncharacter, as `shield.MARK` is."""


@dataclass(frozen=True, slots=True)
class Kept:
    """`texts` maps a mark to the reasoning that belongs before it and what the template adds behind the mark."""

    texts: Mapping[str, tuple[str, str]]
    frame: tuple[str, str]
    has_any: bool = False

    @classmethod
    def of(cls, turns: list[Turn], traits: Traits) -> Kept:
        """Marks the turns (in place) whose reasoning the template might drop."""
        texts: dict[str, tuple[str, str]] = {}
        key, frame = traits.reasoning_key, traits.reasoning_frame
        has_any = any(key and turn.get(key) for turn in turns)
        if key is None or frame is None:
            return cls({}, ("", ""), has_any)
        for i, turn in enumerate(turns):
            words = turn["content"]
            if turn["role"] != "assistant" or not turn.get(key) or not isinstance(words, str):
                continue
            mark = f"{_MARK}{i}{_MARK}"
            words = words.lstrip("\n")
            has_only_calls = bool(turn.get("tool_calls")) and not words
            texts[mark] = (turn[key].strip("\n"), traits.call_gap if has_only_calls else "")
            turn["content"] = mark + words
        return cls(texts, frame, has_any)

    def variables(self, source: str) -> dict[str, Any]:
        """What templates call it that can do this by themselves."""
        found: dict[str, Any] = {}
        if not self.has_any:
            return found
        if "preserve_thinking" in source:
            found["preserve_thinking"] = True
        if "clear_thinking" in source:
            found["clear_thinking"] = False
        return found

    def fill(self, text: str) -> str:
        """The rendered text with each reasoning in its place, once, and without marks."""
        before, after = self.frame
        for mark, (reasoning, gap) in self.texts.items():
            head, found, tail = text.partition(mark)
            if not found:
                continue
            shown = "" if _ends_with(head, reasoning, after) else before + reasoning + after
            text = head + shown + tail.removeprefix(gap)
        return text


def _ends_with(text: str, reasoning: str, after: str) -> bool:
    """Whether the reasoning stands there already, give or take white space."""
    text, after = text.rstrip(), after.strip()
    return text.endswith(after) and text.removesuffix(after).rstrip().endswith(reasoning.strip())
