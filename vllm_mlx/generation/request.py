"""One generation, protocol-neutral: what `api` asks of `generation`. Frozen; no wire types, no tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class TextPart:
    text: str


@dataclass(frozen=True, slots=True)
class MediaPart:
    """An image, video or sound where it stands in a message.

    `source` is a URL, a `data:` URL, or an absolute path, as the client wrote it; `param` names the field for errors.
    """

    kind: str
    source: str
    param: str
    options: Mapping[str, Any] = field(default_factory=dict)


Part = TextPart | MediaPart


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made earlier; `arguments` is a JSON object as text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. `role` is system, user, assistant or tool (protocols map `developer` to system)."""

    role: str
    parts: tuple[Part, ...] = ()
    reasoning: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None

    @property
    def text(self) -> str:
        return "".join(p.text for p in self.parts if isinstance(p, TextPart))


@dataclass(frozen=True, slots=True)
class Tool:
    """A function the model may call; `parameters` is a JSON Schema object."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """`mode` is none, auto, required or named (then `name` is set)."""

    mode: str = "auto"
    name: str | None = None


@dataclass(frozen=True, slots=True)
class OutputFormat:
    """The shape the answer must have. `kind`: json_object, json_schema, regex, choice, lark or gbnf.

    `value` is its source: for json_schema a mapping, for choice a tuple of strings, for json_object None, else text.
    `param` is the field it came in, for errors.
    """

    kind: str
    value: Any = None
    strict: bool = True
    param: str = "response_format"


@dataclass(frozen=True, slots=True)
class SamplingOverrides:
    """What the client set; None means the default of flag, generation_config.json or program, in this order."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    num_logprobs: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    xtc_probability: float | None = None
    xtc_threshold: float | None = None


@dataclass(frozen=True, slots=True)
class ReasoningOptions:
    """`enabled` None leaves it to the template; `effort` is passed to the template; `max_tokens` caps the reasoning.

    `keep_earlier`: show the model its reasoning of earlier turns also where the template would drop it; None leaves it
    to the server.
    """

    enabled: bool | None = None
    effort: str | None = None
    max_tokens: int | None = None
    keep_earlier: bool | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """What to generate. Either `messages` (chat) or `prompt` (text, or token ids) is given.

    `timeout_s` may shorten the server's ceiling, never lengthen it. `client` identifies who asks, for fairness and
    cache namespaces. `continue_final_message` generates on from the last assistant message instead of a new turn.
    `adapter`: the name of a LoRA adapter, empty for none.
    `clamp_max_tokens`: a `max_tokens` that does not fit beside the prompt means "what is left" instead of an error.
    """

    id: str
    messages: tuple[ChatMessage, ...] = ()
    prompt: str | Sequence[int] | None = None
    tools: tuple[Tool, ...] = ()
    tool_choice: ToolChoice = ToolChoice()
    parallel_tool_calls: bool = True
    output_format: OutputFormat | None = None
    sampling: SamplingOverrides = SamplingOverrides()
    reasoning: ReasoningOptions = ReasoningOptions()
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    continue_final_message: bool = False
    timeout_s: float | None = None
    priority: int = 0
    client: str = ""
    namespace: str = ""
    model: str | None = None
    adapter: str = ""
    repetition_policy: str | None = None
    parse_output: bool = True
    skip_special_tokens: bool = True
    num_prompt_logprobs: int | None = None
    clamp_max_tokens: bool = False
