"""OpenAI request bodies as pydantic types, with vLLM's and this server's extensions. Used at the edge only.

Strict: a string is not a number. Unknown fields are tolerated. Fields that are known but not served are declared, so
that `convert` can refuse a value that would have had an effect, instead of ignoring it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from vllm_mlx.api.fields import GenerationFields, MaxTokens, NumThinkingTokens, ThinkingFields
from vllm_mlx.api.wire import WireModel, kind_of, text_or_list, tool_choice_form

StringOrStrings = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[str], Tag("<list>")],
    Discriminator(text_or_list),
]


# --- chat messages -------------------------------------------------------------------------------------------------

ImageDetail = Literal["auto", "low", "high", "original"]


class ImageUrl(WireModel):
    url: str = Field(min_length=1)
    detail: ImageDetail | None = None


class InputAudio(WireModel):
    data: str = Field(min_length=1)
    format: str = "wav"


class MediaUrl(WireModel):
    url: str = Field(min_length=1)


def _url_form(value: Any) -> str:
    return "<url>" if isinstance(value, str) else "<object>"


ImageUrlOrString = Annotated[
    Annotated[str, Field(min_length=1), Tag("<url>")] | Annotated[ImageUrl, Tag("<object>")], Discriminator(_url_form)
]
MediaUrlOrString = Annotated[
    Annotated[str, Field(min_length=1), Tag("<url>")] | Annotated[MediaUrl, Tag("<object>")], Discriminator(_url_form)
]


class TextPart(WireModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


class RefusalPart(WireModel):
    type: Literal["refusal"]
    refusal: str


class ThinkingPart(WireModel):
    """Reasoning sent back inside content, as some clients do."""

    type: Literal["thinking", "reasoning"]
    thinking: str | None = None
    text: str | None = None


class ImagePart(WireModel):
    type: Literal["image_url", "input_image"]
    image_url: ImageUrlOrString
    detail: ImageDetail | None = None


class PlainImagePart(WireModel):
    """As model families write it in their own examples."""

    type: Literal["image"]
    image: ImageUrlOrString
    detail: ImageDetail | None = None


class VideoPart(WireModel):
    type: Literal["video_url"]
    video_url: MediaUrlOrString


class PlainVideoPart(WireModel):
    type: Literal["video"]
    video: MediaUrlOrString


class AudioUrlPart(WireModel):
    type: Literal["audio_url"]
    audio_url: MediaUrlOrString


class AudioPart(WireModel):
    type: Literal["input_audio"]
    input_audio: InputAudio


_PART_TAGS = {
    "text": "<text part>",
    "input_text": "<text part>",
    "output_text": "<text part>",
    "refusal": "<refusal part>",
    "thinking": "<thinking part>",
    "reasoning": "<thinking part>",
    "image_url": "<image part>",
    "input_image": "<image part>",
    "image": "<plain image part>",
    "video_url": "<video part>",
    "video": "<plain video part>",
    "audio_url": "<audio url part>",
    "input_audio": "<audio part>",
}


ContentPart = Annotated[
    Annotated[TextPart, Tag("<text part>")]
    | Annotated[RefusalPart, Tag("<refusal part>")]
    | Annotated[ThinkingPart, Tag("<thinking part>")]
    | Annotated[ImagePart, Tag("<image part>")]
    | Annotated[PlainImagePart, Tag("<plain image part>")]
    | Annotated[VideoPart, Tag("<video part>")]
    | Annotated[PlainVideoPart, Tag("<plain video part>")]
    | Annotated[AudioUrlPart, Tag("<audio url part>")]
    | Annotated[AudioPart, Tag("<audio part>")],
    Discriminator(
        kind_of(_PART_TAGS),
        custom_error_type="unknown_part",
        custom_error_message="a content part must be an object whose 'type' is one of text, image_url, image, "
        "video_url, video, audio_url, input_audio, refusal",
    ),
]

Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")],
    Discriminator(text_or_list),
]


class FunctionCall(WireModel):
    name: str = Field(min_length=1)
    # Clients that keep parsed arguments send the object itself.
    arguments: str | dict[str, Any] | None = None


class AssistantToolCall(WireModel):
    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(WireModel):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    tool_calls: list[AssistantToolCall] | None = None
    tool_call_id: str | None = None


# --- tools and formats ---------------------------------------------------------------------------------------------


class FunctionDefinition(WireModel):
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(WireModel):
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(WireModel):
    name: str = Field(min_length=1)


class NamedToolChoice(WireModel):
    type: Literal["function"]
    function: NamedFunction


class AllowedToolRef(WireModel):
    type: Literal["function"]
    function: NamedFunction


class AllowedTools(WireModel):
    mode: Literal["auto", "required"] = "auto"
    tools: list[AllowedToolRef] = Field(min_length=1)


class AllowedToolChoice(WireModel):
    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedToolChoice, Tag("<named tool>")]
    | Annotated[AllowedToolChoice, Tag("<allowed tools>")],
    Discriminator(tool_choice_form),
]


class JsonSchemaFormat(WireModel):
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(WireModel):
    type: Literal["text", "json_object", "json_schema", "regex", "grammar", "choice"]
    json_schema: JsonSchemaFormat | None = None
    pattern: str | None = None
    grammar: str | None = None
    choices: list[str] | None = None


class StructuredOutputs(WireModel):
    """vLLM's `structured_outputs`; exactly one of these is set."""

    json_value: str | dict[str, Any] | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class StreamOptions(WireModel):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


# --- what chat and completions share -------------------------------------------------------------------------------

TokenId = Annotated[int, Field(ge=0)]


class SamplingFields(GenerationFields):
    """What chat and completions have beyond that: more ways to choose tokens, when to stop, the answer's shape."""

    model: str | None = Field(default=None, description="Served id, or 'default'.")
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = 1
    xtc_probability: Annotated[float, Field(ge=0, le=1)] | None = None
    xtc_threshold: Annotated[float, Field(ge=0, le=0.5)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stop: StringOrStrings | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    max_tokens: MaxTokens | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    user: str | None = None
    cache_salt: str | None = None
    response_format: ResponseFormat | None = None
    guided_json: str | dict[str, Any] | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    # Known, not served: refused unless absent or without effect.
    best_of: int | None = None
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    bad_words: list[str] | None = None
    allowed_token_ids: list[int] | None = None
    truncate_prompt_tokens: int | None = None
    logits_processors: list[Any] | None = None


ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]


class ChatCompletionRequest(ThinkingFields, SamplingFields):
    messages: list[Message]
    max_completion_tokens: MaxTokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    max_thinking_tokens: NumThinkingTokens | None = None
    thinking_token_budget: NumThinkingTokens | None = None
    reasoning_effort: ReasoningEffort | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    video_fps: Annotated[float, Field(gt=0, le=60)] | None = None
    video_max_frames: Annotated[int, Field(ge=1, le=4096)] | None = None
    # Known, not served.
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: dict[str, Any] | None = None
    web_search_options: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    verbosity: str | None = None
    echo: bool | None = None
    chat_template: str | None = None
    documents: list[Any] | None = None


def _prompt_form(value: Any) -> str:
    if not isinstance(value, list):
        return "<text>"
    first = value[0] if value else ""
    if isinstance(first, str):
        return "<texts>"
    return "<token lists>" if isinstance(first, list) else "<tokens>"


PromptInput = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Tag("<texts>")]
    | Annotated[list[TokenId], Tag("<tokens>")]
    | Annotated[list[list[TokenId]], Tag("<token lists>")],
    Discriminator(_prompt_form),
]


class CompletionRequest(SamplingFields):
    prompt: PromptInput
    max_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: str | None = None


class TokenizeRequest(WireModel):
    """vLLM's `/tokenize`: a prompt, or chat messages."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class DetokenizeRequest(WireModel):
    model: str | None = None
    tokens: list[TokenId]
