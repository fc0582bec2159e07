"""Anthropic's Messages request as pydantic types, with this server's extensions. Used at the edge only.

`cache_control` and other hints that change no answer are left out: unknown fields are tolerated.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from vllm_mlx.api.fields import GenerationFields, MaxTokens, ThinkingFields
from vllm_mlx.api.wire import WireModel, kind_of, text_or_list


class TextBlock(WireModel):
    type: Literal["text"]
    text: str


class Base64Source(WireModel):
    type: Literal["base64"]
    media_type: str
    data: str = Field(min_length=1)


class UrlSource(WireModel):
    type: Literal["url"]
    url: str = Field(min_length=1)


class TextSource(WireModel):
    type: Literal["text"]
    data: str


class ContentSource(WireModel):
    type: Literal["content"]
    content: Annotated[
        Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Tag("<list>")], Discriminator(text_or_list)
    ]


ImageSource = Annotated[
    Annotated[Base64Source, Tag("<base64>")] | Annotated[UrlSource, Tag("<url>")],
    Discriminator(
        kind_of({"base64": "<base64>", "url": "<url>"}),
        custom_error_type="unknown_source",
        custom_error_message="an image source must be an object whose 'type' is base64 or url",
    ),
]
DocumentSource = Annotated[
    Annotated[TextSource, Tag("<text>")] | Annotated[ContentSource, Tag("<content>")],
    Discriminator(
        kind_of({"text": "<text>", "content": "<content>"}),
        custom_error_type="unknown_source",
        custom_error_message="documents are taken as text: 'type' must be text or content (PDF files are not read)",
    ),
]


class ImageBlock(WireModel):
    type: Literal["image"]
    source: ImageSource


class DocumentBlock(WireModel):
    type: Literal["document"]
    source: DocumentSource
    title: str | None = None
    context: str | None = None


class SearchResultBlock(WireModel):
    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]


class ThinkingBlock(WireModel):
    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(WireModel):
    type: Literal["redacted_thinking"]
    data: str | None = None


class HostedBlock(WireModel):
    """What a tool at Anthropic did in an earlier turn: histories that began there hold such blocks."""

    type: str


class ToolReferenceBlock(WireModel):
    type: Literal["tool_reference"]
    tool_name: str


class ToolUseBlock(WireModel):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]


_RESULT_KINDS = {
    "text": "<text block>",
    "image": "<image block>",
    "document": "<document block>",
    "search_result": "<search result block>",
    "tool_reference": "<tool reference block>",
}
ResultBlock = Annotated[
    Annotated[TextBlock, Tag("<text block>")]
    | Annotated[ImageBlock, Tag("<image block>")]
    | Annotated[DocumentBlock, Tag("<document block>")]
    | Annotated[SearchResultBlock, Tag("<search result block>")]
    | Annotated[ToolReferenceBlock, Tag("<tool reference block>")],
    Discriminator(
        kind_of(_RESULT_KINDS),
        custom_error_type="unknown_block",
        custom_error_message=f"a tool result is made of blocks whose 'type' is one of {', '.join(_RESULT_KINDS)}",
    ),
]


class ToolResultBlock(WireModel):
    type: Literal["tool_result"]
    tool_use_id: str
    content: (
        Annotated[
            Annotated[str, Tag("<text>")] | Annotated[list[ResultBlock], Tag("<list>")],
            Discriminator(text_or_list),
        ]
        | None
    ) = None
    is_error: bool | None = None


_HOSTED_BLOCKS = dict.fromkeys(
    "server_tool_use web_search_tool_result web_fetch_tool_result code_execution_tool_result compaction "
    "bash_code_execution_tool_result text_editor_code_execution_tool_result tool_search_tool_result mcp_tool_use "
    "mcp_tool_result container_upload".split(),
    "<hosted block>",
)
_BLOCK_KINDS = {
    **_RESULT_KINDS,
    "thinking": "<thinking block>",
    "redacted_thinking": "<redacted thinking block>",
    "tool_use": "<tool use block>",
    "tool_result": "<tool result block>",
}
Block = Annotated[
    Annotated[TextBlock, Tag("<text block>")]
    | Annotated[ImageBlock, Tag("<image block>")]
    | Annotated[DocumentBlock, Tag("<document block>")]
    | Annotated[SearchResultBlock, Tag("<search result block>")]
    | Annotated[ToolReferenceBlock, Tag("<tool reference block>")]
    | Annotated[HostedBlock, Tag("<hosted block>")]
    | Annotated[ThinkingBlock, Tag("<thinking block>")]
    | Annotated[RedactedThinkingBlock, Tag("<redacted thinking block>")]
    | Annotated[ToolUseBlock, Tag("<tool use block>")]
    | Annotated[ToolResultBlock, Tag("<tool result block>")],
    Discriminator(
        kind_of(_BLOCK_KINDS | _HOSTED_BLOCKS),
        custom_error_type="unknown_block",
        custom_error_message=f"a content block must be an object whose 'type' is one of {', '.join(_BLOCK_KINDS)}",
    ),
]

Content = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[Block], Tag("<list>")],
    Discriminator(text_or_list),
]
System = Annotated[
    Annotated[str, Tag("<text>")] | Annotated[list[TextBlock], Tag("<list>")],
    Discriminator(text_or_list),
]


class Message(WireModel):
    role: Literal["user", "assistant", "system"]
    content: Content


class ToolDefinition(WireModel):
    name: str = Field(min_length=1, max_length=256)
    type: str | None = None
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class ToolChoice(WireModel):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(WireModel):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class OutputFormatBlock(WireModel):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(WireModel):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormatBlock | None = None


class ContextEdit(WireModel):
    """Of the edits only `clear_thinking` has a meaning here; `keep` is "all", or an object with a `value` of turns."""

    type: str
    keep: Any = None


class ContextManagement(WireModel):
    edits: list[ContextEdit] | None = None


class PromptFields(ThinkingFields):
    """What decides the prompt: the same for a message and for counting its tokens."""

    model: str | None = None
    messages: list[Message]
    system: System | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: ContextManagement | None = None
    # Known, not served.
    mcp_servers: list[Any] | None = None
    container: Any = None


class CountTokensRequest(PromptFields):
    """The body of /v1/messages/count_tokens."""


class MessagesRequest(GenerationFields, PromptFields):
    """The body of /v1/messages."""

    max_tokens: MaxTokens
    stop_sequences: list[str] | None = None
