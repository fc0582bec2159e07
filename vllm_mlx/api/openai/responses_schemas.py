"""OpenAI's Responses request as pydantic types, with this server's extensions. Used at the edge only.

Tools keep fields that are unknown here, because an answer repeats them. Tool descriptors of kinds that run at OpenAI
are read as `HostedTool` and ignored with a note: agents send them to every server.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag

from vllm_mlx.api.fields import GenerationFields, MaxTokens, NumThinkingTokens, ThinkingFields
from vllm_mlx.api.openai.schemas import AudioPart, ImageDetail, ReasoningEffort, RefusalPart
from vllm_mlx.api.wire import WireModel, kind_of, text_or_list, tool_choice_form, type_of

# --- content -------------------------------------------------------------------------------------------------------


class TextPart(WireModel):
    type: Literal["input_text", "output_text", "text"]
    text: str


class ImagePart(WireModel):
    type: Literal["input_image"]
    image_url: str | None = None
    file_id: str | None = None
    detail: ImageDetail | None = None


_PART_TAGS = {
    "input_text": "<text part>",
    "output_text": "<text part>",
    "text": "<text part>",
    "refusal": "<refusal part>",
    "input_image": "<image part>",
    "input_audio": "<audio part>",
}
ContentPart = Annotated[
    Annotated[TextPart, Tag("<text part>")]
    | Annotated[RefusalPart, Tag("<refusal part>")]
    | Annotated[ImagePart, Tag("<image part>")]
    | Annotated[AudioPart, Tag("<audio part>")],
    Discriminator(
        kind_of(_PART_TAGS),
        custom_error_type="unknown_part",
        custom_error_message="a content part must be an object whose 'type' is one of input_text, output_text, "
        "input_image, input_audio, refusal (files are not read; send their text)",
    ),
]
Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[ContentPart], Tag("<list>")],
    Discriminator(text_or_list),
]


# --- input items ---------------------------------------------------------------------------------------------------


class MessageItem(WireModel):
    type: Literal["message"] = "message"
    id: str | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Content


class ReasoningText(WireModel):
    type: Literal["reasoning_text", "summary_text", "text"]
    text: str


class ReasoningItem(WireModel):
    type: Literal["reasoning"]
    id: str | None = None
    summary: list[ReasoningText] | None = None
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None


class FunctionCallItem(WireModel):
    type: Literal["function_call"]
    id: str | None = None
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    namespace: str | None = None
    arguments: str


class CustomCallItem(WireModel):
    type: Literal["custom_tool_call"]
    id: str | None = None
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    namespace: str | None = None
    input: str


class CallOutputItem(WireModel):
    type: Literal["function_call_output", "custom_tool_call_output"]
    id: str | None = None
    call_id: str = Field(min_length=1)
    output: Content


class ItemReference(WireModel):
    type: Literal["item_reference"]
    id: str | None = None


class HostedItem(WireModel):
    """What a tool at OpenAI did in an earlier turn: histories that began there hold such items."""

    type: str
    id: str | None = None


_ITEM_TAGS = {
    "message": "<message>",
    "reasoning": "<reasoning>",
    "function_call": "<function call>",
    "custom_tool_call": "<custom call>",
    "function_call_output": "<call output>",
    "custom_tool_call_output": "<call output>",
    "item_reference": "<item reference>",
    **dict.fromkeys(
        "web_search_call file_search_call computer_call computer_call_output image_generation_call "
        "code_interpreter_call local_shell_call local_shell_call_output shell_call shell_call_output apply_patch_call "
        "apply_patch_call_output mcp_list_tools mcp_approval_request mcp_approval_response mcp_call tool_search_call "
        "tool_search_output compaction".split(),
        "<hosted item>",
    ),
}


def _item_kind(value: Any) -> str | None:
    found = type_of(value)
    if found is None:
        # The short form of a message has no type.
        return "<message>" if isinstance(value, dict) else None
    return _ITEM_TAGS.get(found) if isinstance(found, str) else None


InputItem = Annotated[
    Annotated[MessageItem, Tag("<message>")]
    | Annotated[ReasoningItem, Tag("<reasoning>")]
    | Annotated[FunctionCallItem, Tag("<function call>")]
    | Annotated[CustomCallItem, Tag("<custom call>")]
    | Annotated[CallOutputItem, Tag("<call output>")]
    | Annotated[ItemReference, Tag("<item reference>")]
    | Annotated[HostedItem, Tag("<hosted item>")],
    Discriminator(
        _item_kind,
        custom_error_type="unknown_item",
        custom_error_message="an input item must be an object: a message with 'role' and 'content', or one whose "
        "'type' is reasoning, function_call, function_call_output, custom_tool_call or custom_tool_call_output",
    ),
]
Input = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[InputItem], Tag("<list>")],
    Discriminator(text_or_list),
]


# --- tools ---------------------------------------------------------------------------------------------------------


class ToolModel(WireModel):
    model_config = ConfigDict(extra="allow")


class FunctionTool(ToolModel):
    type: Literal["function"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class CustomFormat(ToolModel):
    type: Literal["text", "grammar"]
    syntax: str | None = None
    definition: str | None = None


class CustomTool(ToolModel):
    type: Literal["custom"]
    name: str = Field(min_length=1, max_length=256)
    description: str | None = None
    format: CustomFormat | None = None


NestedTool = Annotated[
    Annotated[FunctionTool, Tag("<function>")] | Annotated[CustomTool, Tag("<custom>")],
    Discriminator(
        kind_of({"function": "<function>", "custom": "<custom>"}),
        custom_error_type="unknown_tool",
        custom_error_message="a tool in a namespace must be an object whose 'type' is function or custom",
    ),
]


class NamespaceTool(ToolModel):
    type: Literal["namespace"]
    name: str = Field(min_length=1, max_length=128)
    description: str | None = None
    tools: list[NestedTool]


class HostedTool(ToolModel):
    """A tool that OpenAI would run: web_search, image_generation and whatever comes next."""

    type: str = Field(min_length=1)


Tool = Annotated[
    Annotated[FunctionTool, Tag("<function>")]
    | Annotated[CustomTool, Tag("<custom>")]
    | Annotated[NamespaceTool, Tag("<namespace>")]
    | Annotated[HostedTool, Tag("<hosted>")],
    Discriminator(kind_of({"function": "<function>", "custom": "<custom>", "namespace": "<namespace>"}, "<hosted>")),
]


class NamedToolChoice(WireModel):
    type: Literal["function", "custom"]
    name: str = Field(min_length=1)
    namespace: str | None = None


class AllowedToolChoice(WireModel):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"] = "auto"
    tools: list[NamedToolChoice] = Field(min_length=1)


ToolChoice = Annotated[
    Annotated[Literal["none", "auto", "required"], Tag("<mode>")]
    | Annotated[NamedToolChoice, Tag("<named tool>")]
    | Annotated[AllowedToolChoice, Tag("<allowed tools>")],
    Discriminator(tool_choice_form),
]


# --- the request ---------------------------------------------------------------------------------------------------


class TextFormat(WireModel):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextOptions(WireModel):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class Reasoning(WireModel):
    effort: ReasoningEffort | None = None
    summary: Literal["auto", "concise", "detailed", "none"] | None = None


Include = Literal[
    "reasoning.encrypted_content",
    "message.output_text.logprobs",
    # What these would add belongs to tools that run at OpenAI; there is nothing to add here.
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
]


class StreamOptions(WireModel):
    include_obfuscation: bool | None = None


class PromptFields(ThinkingFields):
    """What decides the prompt: the same for a response and for counting its tokens."""

    model: str | None = Field(default=None, description="Served id, or 'default'.")
    input: Input | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    # Known, not served: refused unless absent or without effect.
    conversation: Any = None
    prompt: Any = None


class InputTokensRequest(PromptFields):
    """The body of /v1/responses/input_tokens."""


class ResponsesRequest(GenerationFields, PromptFields):
    """The body of /v1/responses."""

    store: bool | None = None
    stream_options: StreamOptions | None = None
    include: list[Include] | None = None
    max_output_tokens: MaxTokens | None = None
    metadata: dict[str, str] | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    user: str | None = None
    service_tier: str | None = None
    max_tool_calls: Annotated[int, Field(ge=1)] | None = None
    # This server's extension.
    max_thinking_tokens: NumThinkingTokens | None = None
    # Known, not served: refused unless absent or without effect.
    background: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
