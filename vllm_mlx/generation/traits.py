"""What a chat template can take, found out by asking it: small probe conversations are rendered, and what comes out
tells. A template is foreign code; whatever it raises means "not this". Done once for a template; worker threads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Turn = dict[str, Any]

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template can take. `media`: (role, kind) of the media parts for which it writes a placeholder.

    `wants_tools_always`: it walks over the tools without asking whether there are any. `call_ids`: "any", or "nine"
    where ids of calls must have nine letters and digits. `reasoning_frame`: what the template writes before and after
    the reasoning of its last turn, where it leaves out that of earlier ones. `call_gap`: what stands between a turn's
    words and its first call, and not before a call without words.
    """

    takes_strings: bool = True
    takes_parts: bool = False
    takes_system: bool = True
    takes_leading_systems: bool = True
    takes_later_systems: bool = True
    takes_same_role_twice: bool = True
    takes_tools: bool = False
    wants_tools_always: bool = False
    takes_tool_turns: bool = False
    takes_parallel_calls: bool = True
    takes_user_after_tool: bool = True
    wants_arguments_as_text: bool = False
    call_ids: str = "any"
    reasoning_key: str | None = None
    reasoning_frame: tuple[str, str] | None = None
    call_gap: str = ""
    media: frozenset[tuple[str, str]] = frozenset()


def read_traits(apply: Callable[..., str], source: str, placeholders: Mapping[str, str]) -> Traits:
    """Ask the template. `apply(turns, **options)` renders, or raises."""
    probe = _Probe(apply)
    later = probe.render(probe.user, probe.answer, probe.say("system", "probe-s"), probe.user, probe.answer, probe.user)
    leading = probe.render(probe.say("system", "probe-1"), probe.say("system", "probe-2"), probe.user)
    calls = _read_calls(probe)
    reasoning_key = next((k for k in _REASONING_KEYS if _mentions_field(source, k)), None)
    return Traits(
        takes_strings=probe.takes_strings,
        takes_parts=probe.takes_parts,
        takes_system="probe-s" in probe.render(probe.say("system", "probe-s"), probe.user),
        takes_leading_systems=_in_order(leading, "probe-1", "probe-2", "probe-u"),
        takes_later_systems=_in_order(later, "probe-u", "probe-a", "probe-s", "probe-u", "probe-a", "probe-u"),
        takes_same_role_twice=_in_order(
            probe.render(probe.user, probe.say("user", "probe-v"), probe.answer, probe.user), "probe-u", "probe-v"
        ),
        takes_tools="probe_tool" in probe.render(probe.user, tools=[_TOOL]),
        wants_tools_always=probe.wants_tools_always,
        reasoning_key=reasoning_key,
        reasoning_frame=_read_frame(probe, reasoning_key) if reasoning_key else None,
        media=frozenset(
            (role, kind)
            for kind, placeholder in placeholders.items()
            for role in _media_roles(probe, kind, placeholder)
        ),
        **calls,
    )


class _Probe:
    """Renders probe conversations in the form of content that the template takes."""

    def __init__(self, apply: Callable[..., str]) -> None:
        self._apply = apply
        self.wants_tools_always = False
        user = {"role": "user", "content": "probe-u"}
        as_parts = {"role": "user", "content": [{"type": "text", "text": "probe-u"}]}
        if not self.render(user) and not self.render(as_parts):
            self.wants_tools_always = bool(self.render(user, tools=[]) or self.render(as_parts, tools=[]))
        text = self.render(as_parts)
        self.takes_parts = "probe-u" in text and "'type'" not in text and '"type"' not in text
        self.takes_strings = "probe-u" in self.render(user) or not self.takes_parts
        self.user, self.answer = self.say("user", "probe-u"), self.say("assistant", "probe-a")

    def render(self, *turns: Turn, **options: Any) -> str:
        if self.wants_tools_always:
            options.setdefault("tools", [])
        try:
            return self._apply(list(turns), **{"add_generation_prompt": True, **options})
        except Exception:  # whatever it raises, it means: not this
            return ""

    def say(self, role: str, text: str) -> Turn:
        return {"role": role, "content": text if self.takes_strings else [{"type": "text", "text": text}]}

    def call(self, arguments: Any, call_id: str = "callprobe", name: str = "probe_call") -> Turn:
        return {**self.say("assistant", ""), "tool_calls": [_tool_call(arguments, call_id, name)]}

    def result(self, text: str = "probe-r", call_id: str = "callprobe") -> Turn:
        return {**self.say("tool", text), "tool_call_id": call_id, "name": "probe_call"}


def _tool_call(arguments: Any, call_id: str, name: str) -> dict[str, Any]:
    return {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


def _read_calls(probe: _Probe) -> dict[str, Any]:
    """How the template takes calls and their results."""
    end = (probe.answer, probe.user)

    def talk(arguments: Any, call_id: str = "callprobe") -> str:
        turns = (probe.user, probe.call(arguments, call_id), probe.result(call_id=call_id))
        return probe.render(*turns, *end, tools=[_TOOL])

    with_object, with_text = talk({"probe_arg": "v"}), talk('{"probe_arg": "v"}')
    as_text = _is_better_as_text(with_object, with_text)
    called = with_text if as_text else with_object
    takes_turns = _in_order(called, "probe_call", "probe-r") and "probe_arg" in called
    if not takes_turns:
        return {"takes_tool_turns": False}
    arguments: Any = '{"probe_arg": "v"}' if as_text else {"probe_arg": "v"}
    two = probe.call(arguments)
    two["tool_calls"] = [
        _tool_call(arguments, "callprob1", "probe_one"),
        _tool_call(arguments, "callprob2", "probe_two"),
    ]
    results = (probe.result("probe-r1", "callprob1"), probe.result("probe-r2", "callprob2"))
    both = probe.render(probe.user, two, *results, *end, tools=[_TOOL])
    then_user = probe.render(
        probe.user, probe.call(arguments), probe.result(), probe.say("user", "probe-v"), tools=[_TOOL]
    )
    with_words = {**probe.call(arguments), **probe.say("assistant", "probe-a")}
    ids_are_free = all("probe-r" in talk(arguments, call_id) for call_id in ("c1", "call_" + "0" * 24))
    return {
        "takes_tool_turns": True,
        "takes_parallel_calls": _in_order(both, "probe_one", "probe_two", "probe-r1", "probe-r2"),
        "takes_user_after_tool": _in_order(then_user, "probe-r", "probe-v"),
        "wants_arguments_as_text": as_text,
        "call_ids": "any" if ids_are_free else "nine",
        "call_gap": _gap(
            probe.render(probe.user, probe.call(arguments), probe.result(), tools=[_TOOL]),
            probe.render(probe.user, with_words, probe.result(), tools=[_TOOL]),
        ),
    }


def _gap(without_words: str, with_words: str) -> str:
    """What a template adds to words that a call follows."""
    head, found, tail = with_words.partition("probe-a")
    if not found or not without_words.startswith(head):
        return ""
    gap = tail.removesuffix(without_words[len(head) :])
    return gap if gap != tail and gap.isspace() else ""


def _read_frame(probe: _Probe, key: str) -> tuple[str, str] | None:
    """Text around the reasoning of the last turn; None where earlier turns keep theirs, or the last one has none."""
    thinking = {**probe.answer, key: "probe-t"}
    earlier = probe.render(probe.user, thinking, probe.user)
    last = probe.render(probe.user, thinking, add_generation_prompt=False)
    head, found, _ = earlier.partition("probe-a")
    if not found or "probe-t" in earlier or not last.startswith(head):
        return None
    before, found, rest = last[len(head) :].partition("probe-t")
    after, has_answer, _ = rest.partition("probe-a")
    return (before, after) if found and has_answer else None


def _media_roles(probe: _Probe, kind: str, placeholder: str) -> list[str]:
    """The roles in whose turns the template writes this kind of media."""
    parts = [{"type": kind}, {"type": "text", "text": "probe-m"}]
    result = {**probe.result(), "content": parts}
    seen = {
        "user": probe.render({"role": "user", "content": parts}),
        "system": probe.render({"role": "system", "content": parts}, probe.user),
        "assistant": probe.render(probe.user, {"role": "assistant", "content": parts}, probe.user),
        "tool": probe.render(probe.user, probe.call({"a": "v"}), result, probe.answer, probe.user, tools=[_TOOL])
        or probe.render(probe.user, probe.call("{}"), result, probe.answer, probe.user, tools=[_TOOL]),
    }
    return [role for role, text in seen.items() if placeholder in text and "probe-m" in text]


def _in_order(text: str, *wanted: str) -> bool:
    position = 0
    for word in wanted:
        found = text.find(word, position)
        if found < 0:
            return False
        position = found + len(word)
    return True


def _is_better_as_text(with_object: str, with_text: str) -> bool:
    """An object was refused, or came out as Python's repr; the text came out as it is."""
    if "probe_arg" not in with_text or '\\"probe_arg\\"' in with_text:
        return False
    return "probe_arg" not in with_object or "'probe_arg'" in with_object


def _mentions_field(source: str, key: str) -> bool:
    return re.search(rf"\.{key}\b|\[['\"]{key}['\"]\]|['\"]{key}['\"] in\b|get\(['\"]{key}['\"]", source) is not None
