"""OpenAI wire types → `GenerationRequest`. Pure: what a field means, and which values are refused, is decided here.

A known field whose value cannot be honoured is refused with a 400 that names it; nothing that would change the answer
is ignored in silence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from vllm_mlx.api.fields import asks_to_think, sampling_overrides, treatment
from vllm_mlx.api.openai import schemas as wire
from vllm_mlx.api.params import invalid, missing, refuse
from vllm_mlx.generation.request import (
    ChatMessage,
    GenerationRequest,
    MediaPart,
    OutputFormat,
    Part,
    ReasoningOptions,
    SamplingOverrides,
    TextPart,
    Tool,
    ToolCall,
    ToolChoice,
)

MAX_STOP_STRINGS = 64


# --- chat ----------------------------------------------------------------------------------------------------------


def chat_request(body: wire.ChatCompletionRequest, *, id: str, seed_offset: int = 0, **rest: Any) -> GenerationRequest:
    """The generation that a chat body asks for; `rest` is what HTTP knows (client, namespace, model)."""
    _refuse_unserved(body)
    _refuse_unserved_chat(body)
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise invalid("max_completion_tokens", "max_tokens and max_completion_tokens differ; give one of them.")
    tools, tool_choice = tools_of(body.tools, body.tool_choice)
    return GenerationRequest(
        id=id,
        messages=messages_of(body.messages, video_options=_video_options(body)),
        tools=tools,
        tool_choice=tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        output_format=output_format_of(body),
        sampling=sampling_of(body, num_logprobs=_chat_logprobs(body), seed_offset=seed_offset),
        reasoning=_reasoning_of(body),
        max_tokens=body.max_completion_tokens or body.max_tokens,
        template_kwargs=dict(body.chat_template_kwargs or {}),
        continue_final_message=_continues(body),
        num_prompt_logprobs=body.prompt_logprobs,
        **_common(body),
        **rest,
    )


def completion_request(
    body: wire.CompletionRequest, prompt: str | Sequence[int], *, id: str, seed_offset: int = 0, **rest: Any
) -> GenerationRequest:
    """The generation for one prompt of a completion body."""
    _refuse_unserved(body)
    if body.suffix:
        raise refuse("suffix", "'suffix' (text after the completion) is not supported; leave it out.")
    if body.max_tokens == 0 and not body.echo:
        raise invalid("max_tokens", "'max_tokens': 0 makes sense with 'echo' only; ask for at least one token.")
    # An echoed prompt is scored like the completion.
    num_prompt_logprobs = body.logprobs if body.echo and body.prompt_logprobs is None else body.prompt_logprobs
    return GenerationRequest(
        id=id,
        prompt=prompt,
        output_format=output_format_of(body),
        sampling=sampling_of(body, num_logprobs=body.logprobs, seed_offset=seed_offset),
        # The engine computes one token at least; `completions` drops it when none was asked for.
        max_tokens=1 if body.max_tokens == 0 else body.max_tokens,
        parse_output=False,
        num_prompt_logprobs=num_prompt_logprobs,
        **_common(body),
        **rest,
    )


def prompts_of(body: wire.CompletionRequest) -> list[str | tuple[int, ...]]:
    """The prompts of a completion body, in order."""
    prompt = body.prompt
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "'prompt' must not be an empty list.")
    if isinstance(prompt[0], int):
        return [tuple(token for token in prompt if isinstance(token, int))]
    prompts: list[str | tuple[int, ...]] = []
    for i, item in enumerate(prompt):
        if not isinstance(item, str) and not item:
            raise invalid(f"prompt.{i}", "a prompt of token ids must have at least one token.")
        prompts.append(item if isinstance(item, str) else tuple(item))  # type: ignore[arg-type]
    return prompts


def _common(body: wire.SamplingFields) -> dict[str, Any]:
    return {
        "stop": stop_of(body.stop),
        "stop_token_ids": tuple(body.stop_token_ids or ()),
        "include_stop": bool(body.include_stop_str_in_output),
        "skip_special_tokens": body.skip_special_tokens is not False,
        **treatment(body),
    }


def stop_of(stop: str | list[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise invalid("stop", f"at most {MAX_STOP_STRINGS} stop strings are accepted.")
    if "" in strings:
        raise invalid("stop", "a stop string must not be empty.")
    return strings


def sampling_of(body: wire.SamplingFields, *, num_logprobs: int | None, seed_offset: int = 0) -> SamplingOverrides:
    return replace(
        sampling_overrides(body, seed_offset=seed_offset),
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        logit_bias=logit_bias_of(body.logit_bias),
        num_logprobs=num_logprobs,
        min_tokens=body.min_tokens,
        ignore_eos=bool(body.ignore_eos),
        xtc_probability=body.xtc_probability,
        xtc_threshold=body.xtc_threshold,
    )


def logit_bias_of(bias: Mapping[str, float] | None) -> dict[int, float]:
    result = {}
    for key, value in (bias or {}).items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise invalid(f"logit_bias.{key}"[:80], "a key of 'logit_bias' must be a token id.")
        result[int(key)] = value
    return result


# --- messages ------------------------------------------------------------------------------------------------------


def messages_of(messages: Sequence[wire.Message], *, video_options: Mapping[str, Any]) -> tuple[ChatMessage, ...]:
    if not messages:
        raise invalid("messages", "'messages' must have at least one message.")
    return tuple(_message(message, f"messages.{i}", video_options) for i, message in enumerate(messages))


def _message(message: wire.Message, path: str, video_options: Mapping[str, Any]) -> ChatMessage:
    parts: list[Part] = []
    reasoning = [message.reasoning_content or message.reasoning or ""]
    content = message.content
    if content is None and message.role not in ("assistant",):
        raise invalid(f"{path}.content", f"a message of role '{message.role}' needs 'content'.")
    if isinstance(content, str):
        parts = [TextPart(content)] if content else []
    else:
        for i, part in enumerate(content or ()):
            if isinstance(part, wire.ThinkingPart):
                reasoning.append(part.thinking or part.text or "")
                continue
            converted = _part(part, f"{path}.content.{i}", video_options)
            if isinstance(converted, MediaPart) and message.role == "assistant":
                raise invalid(converted.param, "a message of role 'assistant' can hold text only.")
            parts.append(converted)
    if message.refusal:
        parts.append(TextPart(message.refusal))
    if message.tool_calls and message.role != "assistant":
        raise invalid(f"{path}.tool_calls", "only an assistant message has 'tool_calls'.")
    return ChatMessage(
        role="system" if message.role == "developer" else message.role,
        parts=tuple(parts),
        reasoning="".join(reasoning) or None,
        tool_calls=tuple(_tool_call(call, f"{path}.tool_calls.{i}") for i, call in enumerate(message.tool_calls or ())),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _part(part: wire.ContentPart, path: str, video_options: Mapping[str, Any]) -> Part:
    match part:
        case wire.TextPart():
            return TextPart(part.text)
        case wire.RefusalPart():
            return TextPart(part.refusal)
        case wire.ImagePart() | wire.PlainImagePart():
            field = "image_url" if isinstance(part, wire.ImagePart) else "image"
            image: str | wire.ImageUrl = getattr(part, field)
            source, detail = (image, None) if isinstance(image, str) else (image.url, image.detail)
            detail = detail or part.detail
            return MediaPart("image", source, f"{path}.{field}", {"detail": detail} if detail else {})
        case wire.VideoPart() | wire.PlainVideoPart():
            field = "video_url" if isinstance(part, wire.VideoPart) else "video"
            video: str | wire.MediaUrl = getattr(part, field)
            url = video if isinstance(video, str) else video.url
            return MediaPart("video", url, f"{path}.{field}", video_options)
        case wire.AudioUrlPart():
            url = part.audio_url if isinstance(part.audio_url, str) else part.audio_url.url
            return MediaPart("audio", url, f"{path}.audio_url")
        case wire.AudioPart():
            return audio_part(part, path)
    raise AssertionError(f"no case for {part!r}")


def audio_part(part: wire.AudioPart, path: str) -> MediaPart:
    audio = part.input_audio
    return MediaPart("audio", f"data:audio/{audio.format};base64,{audio.data}", f"{path}.input_audio")


def _tool_call(call: wire.AssistantToolCall, path: str) -> ToolCall:
    arguments = call.function.arguments
    if not isinstance(arguments, str):
        arguments = orjson.dumps(arguments or {}).decode()
    return ToolCall(id=call.id or "", name=call.function.name, arguments=arguments or "{}")


def _video_options(body: wire.ChatCompletionRequest) -> dict[str, Any]:
    options = {"fps": body.video_fps, "max_frames": body.video_max_frames}
    return {name: value for name, value in options.items() if value is not None}


# --- tools ---------------------------------------------------------------------------------------------------------


def tools_of(
    tools: Sequence[wire.ToolDefinition] | None, choice: Any, *, param: str = "tool_choice"
) -> tuple[tuple[Tool, ...], ToolChoice]:
    converted = tuple(
        Tool(
            name=tool.function.name,
            description=tool.function.description or "",
            parameters=tool.function.parameters or {"type": "object", "properties": {}},
            strict=bool(tool.function.strict),
        )
        for tool in tools or ()
    )
    names = [tool.name for tool in converted]
    for i, name in enumerate(names):
        if name in names[:i]:
            raise invalid(f"tools.{i}.function.name", f"two tools are named '{name}'.")
    match choice:
        case None:
            return converted, ToolChoice()
        case wire.NamedToolChoice():
            return converted, named_choice(choice.function.name, names, f"{param}.function.name")
        case wire.AllowedToolChoice():
            allowed = {ref.function.name for ref in choice.allowed_tools.tools}
            for name in allowed:
                named_choice(name, names, f"{param}.allowed_tools.tools")
            return tuple(t for t in converted if t.name in allowed), ToolChoice(choice.allowed_tools.mode)
        case "required" if not converted:
            raise invalid(param, "'tool_choice' requires a tool, but 'tools' is empty.")
    return converted, ToolChoice(choice)


def named_choice(name: str, names: Sequence[str], param: str) -> ToolChoice:
    if name not in names:
        raise invalid(param, f"there is no tool named '{name}' in 'tools'.")
    return ToolChoice("named", name)


# --- shape of the answer -------------------------------------------------------------------------------------------


_SHAPE_FIELDS = {
    "json_schema": "response_format.json_schema.schema",
    "regex": "response_format.pattern",
    "grammar": "response_format.grammar",
    "choice": "response_format.choices",
}


def output_format_of(body: wire.SamplingFields) -> OutputFormat | None:
    """The one shape that the body asks for, by any of the fields that can."""
    found: dict[str, OutputFormat] = {}
    if body.response_format is not None and (shape := _response_format(body.response_format)):
        found[_SHAPE_FIELDS.get(body.response_format.type, "response_format")] = shape
    if body.guided_json is not None:
        found["guided_json"] = OutputFormat("json_schema", _schema(body.guided_json, "guided_json"))
    if body.guided_regex is not None:
        found["guided_regex"] = OutputFormat("regex", body.guided_regex)
    if body.guided_choice is not None:
        found["guided_choice"] = _choice(body.guided_choice, "guided_choice")
    if body.guided_grammar is not None:
        found["guided_grammar"] = _grammar(body.guided_grammar)
    if body.structured_outputs is not None:
        found.update(_structured_outputs(body.structured_outputs))
    if len(found) > 1:
        raise invalid(sorted(found)[0], f"only one of {', '.join(sorted(found))} can be given.")
    return next((replace(shape, param=name) for name, shape in found.items()), None)


def _response_format(given: wire.ResponseFormat) -> OutputFormat | None:
    match given.type:
        case "text":
            return None
        case "json_object":
            return OutputFormat("json_object")
        case "json_schema":
            if given.json_schema is None or given.json_schema.json_schema is None:
                raise invalid(
                    "response_format.json_schema",
                    "'response_format' of type json_schema needs 'json_schema' with a 'schema'.",
                )
            # As OpenAI has it, a schema is enforced when `strict`; a guess at what follows a loose one helps nobody.
            return OutputFormat(
                "json_schema", given.json_schema.json_schema, strict=given.json_schema.strict is not False
            )
        case "regex":
            return OutputFormat("regex", _needed(given.pattern, "response_format.pattern"))
        case "grammar":
            return _grammar(_needed(given.grammar, "response_format.grammar"))
        case "choice":
            return _choice(given.choices, "response_format.choices")


def _structured_outputs(given: wire.StructuredOutputs) -> dict[str, OutputFormat]:
    found: dict[str, OutputFormat] = {}
    if given.json_value is not None:
        found["structured_outputs.json"] = OutputFormat(
            "json_schema", _schema(given.json_value, "structured_outputs.json")
        )
    if given.regex is not None:
        found["structured_outputs.regex"] = OutputFormat("regex", given.regex)
    if given.choice is not None:
        found["structured_outputs.choice"] = _choice(given.choice, "structured_outputs.choice")
    if given.grammar is not None:
        found["structured_outputs.grammar"] = _grammar(given.grammar)
    if given.json_object:
        found["structured_outputs.json_object"] = OutputFormat("json_object")
    return found


def _schema(value: str | dict[str, Any], param: str) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = orjson.loads(value)
        except orjson.JSONDecodeError as error:
            raise invalid(param, f"'{param}' is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise invalid(param, f"'{param}' must be a JSON Schema object.")
    return value


def _choice(choices: list[str] | None, param: str) -> OutputFormat:
    if not choices or "" in choices:
        raise invalid(param, f"'{param}' must be a list of at least one string, none of them empty.")
    return OutputFormat("choice", tuple(choices))


def _grammar(text: str) -> OutputFormat:
    """GBNF writes rules with `::=`, Lark with a colon."""
    return OutputFormat("gbnf" if "::=" in text else "lark", text)


def _needed(value: str | None, param: str) -> str:
    if not value:
        raise missing(param)
    return value


def _chat_logprobs(body: wire.ChatCompletionRequest) -> int | None:
    if body.top_logprobs and not body.logprobs:
        raise invalid("top_logprobs", "'top_logprobs' needs 'logprobs': true.")
    return (body.top_logprobs or 0) if body.logprobs else None


def _reasoning_of(body: wire.ChatCompletionRequest) -> ReasoningOptions:
    """What is asked for wins over what an effort implies: 'none' no reasoning, any other that there is some, also where
    the template's own default is to leave it out."""
    enabled = asks_to_think(body)
    effort = body.reasoning_effort
    if effort is not None and enabled is None:
        enabled = effort != "none"
    effort = None if effort == "none" else effort
    budget = body.max_thinking_tokens if body.max_thinking_tokens is not None else body.thinking_token_budget
    return ReasoningOptions(enabled=enabled, effort=effort, max_tokens=budget)


def _continues(body: wire.ChatCompletionRequest) -> bool:
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise invalid(
                "continue_final_message", "continue_final_message and add_generation_prompt exclude each other."
            )
        if body.messages and body.messages[-1].role != "assistant":
            raise invalid("continue_final_message", "the last message must be the assistant's to be continued.")
        return True
    if body.add_generation_prompt is False:
        raise refuse(
            "add_generation_prompt", "'add_generation_prompt': false is served with 'continue_final_message' only."
        )
    return False


# --- what is known and not served ----------------------------------------------------------------------------------


def _refuse_unserved(body: wire.SamplingFields) -> None:
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise refuse("best_of", "'best_of' is not supported; use 'n' and choose.")
    if body.use_beam_search:
        raise refuse("use_beam_search", "beam search is not supported.")
    if body.length_penalty not in (None, 1.0):
        raise refuse("length_penalty", "'length_penalty' belongs to beam search, which is not supported.")
    for name in ("bad_words", "allowed_token_ids", "logits_processors"):
        if getattr(body, name):
            raise refuse(
                name, f"'{name}' is not supported; 'logit_bias' and 'structured_outputs' can do similar things."
            )
    if body.truncate_prompt_tokens is not None:
        raise refuse("truncate_prompt_tokens", "prompts are not truncated; send a shorter one.")
    if body.prompt_logprobs is not None and body.stream:
        raise refuse("prompt_logprobs", "'prompt_logprobs' are part of a whole answer; leave 'stream' out.")
    options = body.stream_options
    if options is not None:
        if not body.stream:
            raise invalid("stream_options", "'stream_options' is only allowed with 'stream': true.")
        if options.continuous_usage_stats:
            raise refuse("stream_options.continuous_usage_stats", "usage is sent once, in the last chunk.")
        if options.include_obfuscation:
            raise refuse("stream_options.include_obfuscation", "obfuscation padding is not supported.")


def _refuse_unserved_chat(body: wire.ChatCompletionRequest) -> None:
    if body.functions or body.function_call not in (None, "none", "auto"):
        raise refuse("functions", "'functions' and 'function_call' are deprecated and not supported; use 'tools'.")
    if body.modalities is not None and body.modalities != ["text"]:
        raise refuse("modalities", "this model answers in text only.")
    if body.audio is not None:
        raise refuse("audio", "this model answers in text only.")
    if body.web_search_options is not None:
        raise refuse("web_search_options", "web search is not supported.")
    if body.store:
        raise refuse("store", "chat completions are not stored.")
    if body.service_tier not in (None, "auto", "default"):
        raise refuse("service_tier", "there is one service tier here: 'default'.")
    if body.verbosity not in (None, "medium"):
        raise refuse("verbosity", "'verbosity' is not supported; say it in the system message.")
    if body.echo:
        raise refuse("echo", "'echo' is served by /v1/completions only.")
    if body.chat_template is not None:
        raise refuse("chat_template", "the model's own chat template is used; templates from clients are not accepted.")
    if body.documents:
        raise refuse("documents", "'documents' are not supported; put them into a message.")
