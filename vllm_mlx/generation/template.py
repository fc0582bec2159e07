"""Messages to text by the model's own chat template.

A template is foreign code of unknown abilities: `traits.py` asks it what it can take, `fitting.py` puts messages into
such a shape, and here the turns are written and rendered. Worker threads; the traits are read once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.engine_port import Tokenizer
from vllm_mlx.generation.fitting import fit, merged_parts, tool_schema
from vllm_mlx.generation.kept_reasoning import Kept
from vllm_mlx.generation.request import ChatMessage, MediaPart, TextPart, Tool
from vllm_mlx.generation.traits import Traits, Turn, read_traits
from vllm_mlx.parsers.discover import find_tool_format

# Arguments of apply_chat_template that are not variables of the template.
_RESERVED = frozenset(
    "conversation messages tools chat_template add_generation_prompt continue_final_message tokenize padding "
    "truncation max_length return_tensors return_dict return_assistant_tokens_mask tokenizer_kwargs "
    "sanitize_control_tokens".split()
)
DEFAULT_FORMAT = "hermes"
"""The form of calls of which most models have seen most; for templates that know none of their own."""


class ChatTemplate:
    """One model's template. `placeholders`: how the model's processor wants each kind of media written.

    `tool_format` names the format in which the model is known to write calls, if any is.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        source: str,
        placeholders: Mapping[str, str] | None = None,
        tool_format: str | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.source = source
        self._placeholders = dict(placeholders or {})
        self.described_format = _described_format(tool_format)
        """The format of calls that are described or written as text, where the template has no way of its own."""

    def render(
        self,
        messages: Sequence[ChatMessage],
        tools: Sequence[Tool] = (),
        *,
        variables: Mapping[str, Any] | None = None,
        continue_final_message: bool = False,
        add_generation_prompt: bool = True,
        keep_reasoning: bool = False,
    ) -> str:
        """The prompt's text. InvalidRequest when the template refuses the conversation.

        `keep_reasoning`: reasoning of earlier turns stays where it was written, also if the template would drop it.
        """
        turns = self.turns(messages, tools)
        kept = Kept.of(turns, self.traits) if keep_reasoning else None
        if kept is not None:
            variables = {**kept.variables(self.source), **(variables or {})}
        if continue_final_message:
            turns = _as_continuable(turns)
        shown = self._shown_tools(tools)
        try:
            text = self._apply(
                turns,
                tools=shown,
                add_generation_prompt=add_generation_prompt and not continue_final_message,
                continue_final_message=continue_final_message,
                **(variables or {}),
            )
        except Exception as error:  # a template is foreign code and raises what it likes
            raise InvalidRequest(
                f"The chat template of this model cannot render these messages: {_first_line(error)}", param="messages"
            ) from error
        return kept.fill(text) if kept is not None else text

    def turns(self, messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> list[Turn]:
        """The messages as this template can take them."""
        envelope = find_tool_format(self.described_format).envelope
        assert envelope is not None
        fitted = fit(messages, tools, self.traits, envelope)
        names = {call.id: call.name for m in fitted for call in m.tool_calls}
        return [self._turn(m, names) for m in fitted]

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

    def _shown_tools(self, tools: Sequence[Tool]) -> list[dict[str, Any]] | None:
        if tools and self.traits.takes_tools:
            return [tool_schema(t) for t in tools]
        return [] if self.traits.wants_tools_always else None

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


def _described_format(tool_format: str | None) -> str:
    envelope = find_tool_format(tool_format).envelope if tool_format is not None else None
    return tool_format if tool_format is not None and envelope and envelope.style == "json" else DEFAULT_FORMAT


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _as_continuable(turns: list[Turn]) -> list[Turn]:
    """`continue_final_message` wants text to find again in the rendering."""
    if not turns or turns[-1]["role"] != "assistant":
        raise InvalidRequest("Only an assistant message can be continued; the last one is not.", param="messages")
    return turns
