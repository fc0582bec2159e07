"""Is an answer right? One function per kind of `Check`; each gets the answer without its `<think>` block, and what is wanted."""

import json
import re
from collections.abc import Callable
from typing import Any

from .chat import Check, Sample
from .words import COUNT_WORDS

_THINK = re.compile(r"<think>\s*(.*?)\s*</think>\s*", re.DOTALL)
_CALL = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)


def _equals(text: str, want: str) -> bool:
    return text == want.strip()


def _keys(text: str, want: tuple[str, ...]) -> bool:
    return all(key.lower() in text.lower() for key in want)


def _ordered(text: str, want: tuple[str, ...]) -> bool:
    at = 0
    for key in want:
        at = text.find(key, at)
        if at < 0:
            return False
        at += len(key)
    return True


def _sum(text: str, want: int) -> bool:
    numbers = re.findall(r"\d+", text)
    return bool(numbers) and int(numbers[-1]) == want


def _json(text: str, want: dict[str, Any]) -> bool:
    try:
        return json.loads(text) == want
    except json.JSONDecodeError:
        return False


def _sentence(text: str, word: str) -> bool:
    return re.fullmatch(r"[^.!?\n]{3,200}[.!?]", re.sub(r"(?<=\w)\.(?=\w)", "", text)) is not None and word.lower() in text.lower()


def _calls(text: str, want: list[list[Any]]) -> bool:
    found = []
    for body in _CALL.findall(text):
        try:
            call = json.loads(body)
            found.append([call["name"], call["arguments"]])
        except (json.JSONDecodeError, KeyError, TypeError):
            return False
    return found == want and not _CALL.sub("", text).strip()


def _nocall(text: str, want: Check | None) -> bool:
    return "<tool_call>" not in text and 0 < len(text) < 400


def _refusal(text: str, want: str) -> bool:
    return "vllm-mlx serve" in text and len(text) < 300


def _story(text: str, word: str) -> bool:
    sentences = [s.strip() for s in re.split(r"[.!?]", text) if len(s.split()) > 3]
    return word.lower() in text.lower() and len(sentences) >= 8 and len(set(sentences)) == len(sentences)


def _count(text: str, want: int) -> bool:
    said = [w for w in COUNT_WORDS if re.search(rf"\b{w}\b", text)]
    return said == [COUNT_WORDS[want]] or re.findall(r"\d+", text) == [str(want)]


def _place(text: str, want: str) -> bool:
    return re.search(rf"\b(the|at|in) {want}\b(?! (left|right))", text) is not None


def _starts(text: str, want: tuple[str, Check]) -> bool:
    word, rest = want
    return text.startswith(word) and judge(rest, text.removeprefix(word).lstrip(" :,.-\n"))


def _ends(text: str, want: tuple[str, Check]) -> bool:
    word, rest = want
    text = text.removesuffix(".") if not word.endswith(".") else text
    return text.endswith(word) and judge(rest, text.removesuffix(word).rstrip(" \n"))


def _capitals(text: str, want: Check) -> bool:
    """Right but for its case, which must be upper."""
    inner = Check(want.kind, want.want.upper()) if want.kind == "equals" else want
    return text == text.upper() and judge(inner, text)


def _keyed(text: str, want: tuple[str, Check]) -> bool:
    key, rest = want
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        return False
    return isinstance(found, dict) and list(found) == [key] and isinstance(found[key], str) and judge(rest, found[key].strip())


def judge(check: Check, answer: str) -> bool:
    return KINDS[check.kind](answer, check.want)


KINDS: dict[str, Callable[[str, Any], bool]] = {
    "equals": _equals, "keys": _keys, "ordered": _ordered, "sum": _sum, "json": _json, "sentence": _sentence, "calls": _calls,
    "nocall": _nocall, "refusal": _refusal, "story": _story, "count": _count, "place": _place,
    "starts": _starts, "ends": _ends, "capitals": _capitals, "keyed": _keyed,
}  # fmt: skip


def right(sample: Sample, text: str) -> bool:
    """Whether `text`, a whole answer, is right; when thinking is on there must be reasoning before it."""
    thought = _THINK.match(text)
    if sample.thinking and not (thought and thought[1]):
        return False
    answer = _THINK.sub("", text, count=1).strip()
    return "<think>" not in answer and judge(sample.check, answer)
