"""Messages to text by the model's own chat template, and what to do where a template cannot take what was sent.

A template is foreign code of unknown abilities, so it is asked: small probe conversations are rendered once, and
what comes out tells its traits. Messages are then put into a shape it can take, in this order of preference:

    as sent  →  leading system turns merged  →  later system turns re-roled to user turns, in their place
             →  the first system turn joined to the first user turn  →  neighbours of one role merged

Templates without tools get the tools described in the system turn, and calls and results as plain text. Nothing is
ever dropped or moved past another turn. Pure functions of their input; worker threads.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.engine_port import Tokenizer
from vllm_mlx.generation.request import ChatMessage, MediaPart, TextPart, Tool

# Arguments of apply_chat_template that are not variables of the template.
_RESERVED = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens".split()
)
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")

DESCRIBED_FORMAT = "hermes"
"""The format in which tools are described to models whose template knows none (`_describe_tools`)."""

Turn = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a template can take."""

    takes_strings: bool = True
    takes_parts: bool = False
    takes_system: bool = True
    takes_leading_systems: bool = True
    takes_later_systems: bool = True
    takes_same_role_twice: bool = True
    takes_tools: bool = False
    takes_tool_turns: bool = False
    wants_arguments_as_text: bool = False
    reasoning_key: str | None = None
    media: frozenset[tuple[str, str]] = frozenset()
    """(role, kind) of the media parts for which it writes a placeholder."""


class ChatTemplate:
    """One model's template. `placeholders`: how the model's processor wants each kind of media written."""

    def __init__(self, tokenizer: Tokenizer, source: str, placeholders: Mapping[str, str] | None = None) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._placeholders = dict(placeholders or {})

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        *,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
    ) -> str:
        """The prompt's text. InvalidRequest when the template refuses the conversation."""
        turns = self.turns(messages, tools)
        if continue_final_message:
            turns = _as_continuable(turns)
        try:
            return self._apply(
                turns,
                tools=[tool_schema(t) for t in tools] if tools and self.traits.takes_tools else None,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except Exception as error:  # a template is foreign code and raises what it likes
            raise InvalidRequest(
                f"The chat template of this model cannot render these messages: {_first_line(error)}", param="messages"
            ) from error

    def turns(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[Turn]:
        """The messages as this template can take them."""
        traits = self.traits
        messages = list(messages)
        if tools and not traits.takes_tools:
            messages = _describe_tools(messages, tools)
        if not traits.takes_tool_turns:
            messages = [_tool_turn_as_text(m) for m in messages]
        messages = _fit_system_turns(messages, traits)
        if not traits.takes_same_role_twice:
            messages = _merge_neighbours(messages)
        names = {call.id: call.name for m in messages for call in m.tool_calls}
        return [self._turn(m, names) for m in messages]

    def place_media(self, messages: Sequence[ChatMessage]) -> tuple[ChatMessage, ...]:
        """Media where the template writes them: those of a tool or system turn that it would not write there go into a
        user turn right behind (behind all results, where several follow each other)."""
        placed: list[ChatMessage] = []
        waiting: list[MediaPart] = []
        for message in messages:
            if waiting and message.role != "tool":
                placed.append(ChatMessage("user", tuple(waiting)))
                waiting = []
            kinds = {p.kind for p in message.parts if isinstance(p, MediaPart)}
            if message.role in ("tool", "system") and not self._writes(message.role, kinds):
                waiting += [p for p in message.parts if isinstance(p, MediaPart)]
                note = TextPart("[see the next message]") if not message.text else TextPart("")
                texts = tuple(p for p in message.parts if isinstance(p, TextPart))
                message = replace(message, parts=(*texts, note))
            placed.append(message)
        return (*placed, ChatMessage("user", tuple(waiting))) if waiting else tuple(placed)

    def _writes(self, role: str, kinds: set[str]) -> bool:
        return all((role, kind) in self.traits.media for kind in kinds)

    def check_variables(self, variables: Mapping[str, Any]) -> None:
        for name in variables:
            if name in _RESERVED:
                raise InvalidRequest(
                    f"chat_template_kwargs cannot set {name}; it is not a variable of the template.",
                    param=f"chat_template_kwargs.{name}",
                )

    @cached_property
    def traits(self) -> Traits:
        return read_traits(self._apply, self.source, self._placeholders)

    def _apply(self, turns: Sequence[Turn], **options: Any) -> str:
        text = self._tokenizer.apply_chat_template(turns, chat_template=self.source, tokenize=False, **options)
        if not isinstance(text, str):
            raise TypeError("the chat template gave no text")
        return text

    def _turn(self, message: ChatMessage, names: Mapping[str, str]) -> Turn:
        turn: Turn = {"role": message.role, "content": self._content(message)}
        if message.tool_calls:
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": self._arguments(call.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.role == "tool":
            turn["tool_call_id"] = message.tool_call_id or ""
            turn["name"] = message.name or names.get(message.tool_call_id or "", "")
        elif message.name:
            turn["name"] = message.name
        key = self.traits.reasoning_key
        # gpt-oss refuses a turn with calls that has both content and thinking.
        if message.reasoning and key and not (key == "thinking" and message.tool_calls and message.text):
            turn[key] = message.reasoning
        return turn

    def _content(self, message: ChatMessage) -> str | list[Turn]:
        parts = merged_parts(message)
        kinds = {p.kind for p in parts if isinstance(p, MediaPart)}
        if kinds and self.traits.takes_strings and not self._writes(message.role, kinds):
            # A template that knows no media: the placeholders are written for it.
            return "\n".join(p.text if isinstance(p, TextPart) else self._placeholders.get(p.kind, "") for p in parts)
        if kinds or not self.traits.takes_strings:
            return [{"type": "text", "text": p.text} if isinstance(p, TextPart) else {"type": p.kind} for p in parts]
        return "".join(p.text for p in parts if isinstance(p, TextPart))

    def _arguments(self, text: str) -> Any:
        """A JSON object as an object unless the template writes arguments as they come; what is none stays text."""
        if self.traits.wants_arguments_as_text:
            return text or "{}"
        try:
            value = json.loads(text or "{}")
        except ValueError:
            return text
        return value if isinstance(value, dict) else text


def tool_schema(tool: Tool) -> dict[str, Any]:
    """A tool as templates know it: OpenAI's function object."""
    parameters = dict(tool.parameters) or {"type": "object", "properties": {}}
    return {
        "type": "function",
        "function": {"name": tool.name, "description": tool.description, "parameters": parameters},
    }


def merged_parts(message: ChatMessage) -> list[TextPart | MediaPart]:
    """Neighbouring text parts become one, so that a string and the same text in blocks render alike."""
    parts: list[TextPart | MediaPart] = []
    for part in message.parts:
        if isinstance(part, TextPart) and parts and isinstance(parts[-1], TextPart):
            parts[-1] = TextPart(_join(parts[-1].text, part.text))
        else:
            parts.append(part)
    return parts


def _join(first: str, second: str) -> str:
    """Two blocks are two paragraphs, unless one of them brings its own white space (or is empty)."""
    glued = not first or not second or first[-1].isspace() or second[0].isspace()
    return first + second if glued else f"{first}\n{second}"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _as_continuable(turns: list[Turn]) -> list[Turn]:
    """`continue_final_message` wants text to find again in the rendering."""
    if not turns or turns[-1]["role"] != "assistant":
        raise InvalidRequest("Only an assistant message can be continued; the last one is not.", param="messages")
    return turns


# ── fitting messages to a template ──────────────────────────────────────────────────────────────────────────────────


def _fit_system_turns(messages: list[ChatMessage], traits: Traits) -> list[ChatMessage]:
    num_leading = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    leading, rest = messages[:num_leading], messages[num_leading:]
    if len(leading) > 1 and not traits.takes_leading_systems:
        leading = [_merge(leading)]
    if not traits.takes_later_systems:
        rest = [_as_user(m) if m.role == "system" else m for m in rest]
    if leading and not traits.takes_system:
        system = _merge(leading)
        if rest and rest[0].role == "user":
            rest[0] = _merge([replace(system, role="user"), rest[0]])
        else:
            rest.insert(0, replace(system, role="user"))
        leading = []
    return leading + rest


def _as_user(message: ChatMessage) -> ChatMessage:
    """A system turn where the template takes none: the same words in the same place, marked as what they are."""
    parts = (TextPart("<system-reminder>\n"), *message.parts, TextPart("\n</system-reminder>"))
    return replace(message, role="user", parts=parts)


def _merge(messages: Sequence[ChatMessage]) -> ChatMessage:
    parts: list[TextPart | MediaPart] = []
    for message in messages:
        if parts and message.parts:
            parts.append(TextPart("\n\n"))
        parts.extend(message.parts)
    calls = tuple(call for m in messages for call in m.tool_calls)
    return replace(messages[0], parts=tuple(parts), tool_calls=calls)


def _merge_neighbours(messages: list[ChatMessage]) -> list[ChatMessage]:
    merged: list[ChatMessage] = []
    for message in messages:
        if merged and message.role == merged[-1].role and message.role in ("user", "assistant"):
            merged[-1] = _merge([merged[-1], message])
        else:
            merged.append(message)
    return merged


def _describe_tools(messages: list[ChatMessage], tools: Sequence[Tool]) -> list[ChatMessage]:
    """For templates that know no tools: say it in the system turn, in the form of which most models have seen most."""
    listing = "\n".join(json.dumps(tool_schema(t), ensure_ascii=False) for t in tools)
    text = (
        "# Tools\n\nYou may call one or more functions. Their signatures:\n<tools>\n"
        f"{listing}\n</tools>\n\nTo call a function, answer with a JSON object of its name and arguments between "
        'these tags:\n<tool_call>\n{"name": <function name>, "arguments": <object>}\n</tool_call>'
    )
    if messages and messages[0].role == "system":
        return [_merge([messages[0], ChatMessage("system", (TextPart(text),))]), *messages[1:]]
    return [ChatMessage("system", (TextPart(text),)), *messages]


def _tool_turn_as_text(message: ChatMessage) -> ChatMessage:
    if message.role == "tool":
        parts = (TextPart("<tool_response>\n"), *message.parts, TextPart("\n</tool_response>"))
        return replace(message, role="user", parts=parts, tool_call_id=None, name=None)
    if message.tool_calls:
        calls = "\n".join(
            f'<tool_call>\n{{"name": {json.dumps(c.name)}, "arguments": {c.arguments or "{}"}}}\n</tool_call>'
            for c in message.tool_calls
        )
        return replace(message, parts=(*message.parts, TextPart(calls)), tool_calls=())
    return message


# ── asking a template what it can take ──────────────────────────────────────────────────────────────────────────────

_TOOL = {
    "type": "function",
    "function": {
        "name": "probe_tool",
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probe_key": {"type": "string"}}, "required": ["probe_key"]},
    },
}


def read_traits(apply: Callable[..., str], source: str, placeholders: Mapping[str, str]) -> Traits:
    def render(*turns: Turn, **options: Any) -> str:
        try:
            return apply(list(turns), **{"add_generation_prompt": True, **options})
        except Exception:  # whatever it raises, it means: not this
            return ""

    def say(role: str, text: str) -> Turn:
        return {"role": role, "content": text if takes_strings else [{"type": "text", "text": text}]}

    takes_strings = "probe-u" in render({"role": "user", "content": "probe-u"})
    as_parts = render({"role": "user", "content": [{"type": "text", "text": "probe-u"}]})
    takes_parts = "probe-u" in as_parts and "'type'" not in as_parts and '"type"' not in as_parts
    takes_strings = takes_strings or not takes_parts
    user, answer = say("user", "probe-u"), say("assistant", "probe-a")

    def call(arguments: Any) -> Turn:
        function = {"name": "probe_tool", "arguments": arguments}
        return {**say("assistant", ""), "tool_calls": [{"id": "callprobe", "type": "function", "function": function}]}

    result = {**say("tool", "probe-r"), "tool_call_id": "callprobe", "name": "probe_tool"}
    with_object = render(user, call({"probe_key": "v"}), result, answer, user, tools=[_TOOL])
    with_text = render(user, call('{"probe_key": "v"}'), result, answer, user, tools=[_TOOL])
    called = with_object if "probe-r" in with_object else with_text

    def media_roles(kind: str, placeholder: str) -> list[str]:
        """The roles in whose turns the template writes this kind of media."""
        parts = [{"type": kind}, {"type": "text", "text": "probe-m"}]
        seen = {
            "user": render({"role": "user", "content": parts}),
            "system": render({"role": "system", "content": parts}, user),
            "assistant": render(user, {"role": "assistant", "content": parts}, user),
            "tool": render(user, call({"probe_key": "v"}), {**result, "content": parts}, user, tools=[_TOOL])
            or render(user, call("{}"), {**result, "content": parts}, user, tools=[_TOOL]),
        }
        return [role for role, text in seen.items() if placeholder in text and "probe-m" in text]

    later = render(user, answer, say("system", "probe-s"), user, answer, user)
    return Traits(
        takes_strings=takes_strings,
        takes_parts=takes_parts,
        takes_system="probe-s" in render(say("system", "probe-s"), user),
        takes_leading_systems=_in_order(
            render(say("system", "probe-1"), say("system", "probe-2"), user), "probe-1", "probe-2", "probe-u"
        ),
        takes_later_systems=_in_order(later, "probe-u", "probe-a", "probe-s", "probe-u", "probe-a", "probe-u"),
        takes_same_role_twice=_in_order(render(user, say("user", "probe-v")), "probe-u", "probe-v"),
        takes_tools="probe_tool" in render(user, tools=[_TOOL]),
        takes_tool_turns="probe-r" in called and "probe_tool" in called,
        wants_arguments_as_text=_is_better_as_text(with_object, with_text),
        reasoning_key=next((k for k in _REASONING_KEYS if _mentions_field(source, k)), None),
        media=frozenset((role, kind) for kind, text in placeholders.items() for role in media_roles(kind, text)),
    )


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
    if "probe_key" not in with_text or '\\"probe_key\\"' in with_text:
        return False
    return "probe_key" not in with_object or "'probe_key'" in with_object


def _mentions_field(source: str, key: str) -> bool:
    return re.search(rf"\.{key}\b|\[['\"]{key}['\"]\]|['\"]{key}['\"] in\b|get\(['\"]{key}['\"]", source) is not None
