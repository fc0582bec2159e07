"""A request to the engine's prompt: template, tokens, media spans, message boundaries, and the one context check.

Runs in worker threads: tokenizer and numpy work, no MLX, no event loop. Everything wrong with the input is an
InvalidRequest (or ContextLengthExceeded) that names the field.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from vllm_mlx.engine.request import MediaSpan, Prompt
from vllm_mlx.errors import ContextLengthExceeded, InvalidRequest
from vllm_mlx.generation import shield
from vllm_mlx.generation.admission import NO_PRESSURE, Pressure
from vllm_mlx.generation.engine_port import Tokenizer
from vllm_mlx.generation.request import GenerationRequest, MediaPart, Part, TextPart, Tool
from vllm_mlx.generation.shield import Shield
from vllm_mlx.generation.template import ChatTemplate
from vllm_mlx.models.span import Clip, VideoFrames

if TYPE_CHECKING:
    from vllm_mlx.models.profile import ModelProfile
    from vllm_mlx.settings import LimitSettings, SamplingSettings

log = logging.getLogger(__name__)

# Tokens that stand at the end of a turn, and at the beginning of one, in the templates there are.
# No tokenizer packs ordinary text this densely; what is longer than so many characters a token does not fit for sure.
_MAX_CHARS_PER_TOKEN = 32
_SAMPLED_TOKENS = 512

_TURN_ENDS = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <end_of_turn> <turn|> <|end|> <|END_OF_TURN_TOKEN|> </s>".split()
)
_TURN_STARTS = frozenset(
    "<|user|> <|assistant|> <|system|> <|observation|> <｜User｜> <｜Assistant｜> [INST] <|im_user|> <|im_assistant|> "
    "<|im_system|> <|start_of_role|> <|START_OF_TURN_TOKEN|>".split()
)
_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class MediaExpander(Protocol):
    """`models/media.py` makes one: the model's own processor. `placeholders`: how it wants each kind written."""

    @property
    def placeholders(self) -> Mapping[str, str]: ...

    def expand(
        self, text: str, images: Sequence[Any], clips: Sequence[Any]
    ) -> tuple[Sequence[int], Sequence[MediaSpan]]:
        """Token ids of `text` with each placeholder grown to its span; the media are in the order of the text."""
        ...


@dataclass(frozen=True, slots=True)
class ContextLimit:
    """How many tokens prompt and completion may have together, and who says so:
    model_config, operator_override or memory."""

    tokens: int
    source: str


@dataclass(frozen=True, slots=True)
class BuiltPrompt:
    """`text` is the rendered prompt, None where token ids were given. `max_tokens` fits beside the prompt."""

    prompt: Prompt
    max_tokens: int
    context: ContextLimit
    text: str | None = None
    num_messages: int = 0
    num_images: int = 0
    num_videos: int = 0

    @property
    def num_media_tokens(self) -> int:
        return sum(span.length for span in self.prompt.media)

    def message_at(self, position: int) -> int | None:
        """Which message the token at `position` belongs to; None before the first or behind the last."""
        boundaries = self.prompt.boundaries
        if not boundaries or not self.num_messages:
            return None
        # A template may put a turn of its own (tools, a default system text) before the first message.
        index = bisect.bisect_right(boundaries, position) - max(0, len(boundaries) - self.num_messages)
        return index if 0 <= index < self.num_messages else None


@dataclass(frozen=True)
class PromptBuilder:
    """Builds the prompts of one model."""

    tokenizer: Tokenizer
    profile: ModelProfile
    limits: LimitSettings
    sampling: SamplingSettings
    expander: MediaExpander | None = None
    tool_format: str | None = None
    _turn_ends: frozenset[int] = field(init=False, repr=False)
    _turn_starts: frozenset[int] = field(init=False, repr=False)
    _template: ChatTemplate | None = field(init=False, repr=False)
    _shield: Shield = field(init=False, repr=False)

    def __post_init__(self) -> None:
        added = {_content(t): i for i, t in self.tokenizer.added_tokens_decoder.items()}
        ends = {added[t] for t in _TURN_ENDS if t in added} | {i for i in self.profile.eos_token_ids if i >= 0}
        object.__setattr__(self, "_turn_ends", frozenset(ends))
        object.__setattr__(self, "_turn_starts", frozenset(added[t] for t in _TURN_STARTS if t in added))
        source = self.profile.chat_template
        placeholders = self.expander.placeholders if self.expander is not None else None
        template = ChatTemplate(self.tokenizer, source, placeholders, self.tool_format) if source else None
        object.__setattr__(self, "_template", template)
        special = [t for t in self.tokenizer.added_tokens_decoder.values() if getattr(t, "special", False)]
        object.__setattr__(self, "_shield", Shield(_content(t) for t in special))

    def build(
        self,
        request: GenerationRequest,
        images: Sequence[Any] = (),
        videos: Sequence[Any] = (),
        pressure: Pressure = NO_PRESSURE,
    ) -> BuiltPrompt:
        """Everything from messages or prompt to a prompt that fits. May take long; call it in a worker thread."""
        prompt, text = self.tokens(request, images, videos)
        context = self.context_limit(pressure)
        return BuiltPrompt(
            prompt,
            self._fit(request, len(prompt), context, pressure),
            context,
            text=text,
            num_messages=len(request.messages),
            num_images=len(images),
            num_videos=sum(isinstance(clip, VideoFrames) for clip in videos),
        )

    def warm_up(self) -> None:
        """Learn the template's traits before the first request has to wait for it."""
        if self._template is not None:
            _ = self._template.traits

    def tokens(
        self, request: GenerationRequest, images: Sequence[Any] = (), videos: Sequence[Any] = ()
    ) -> tuple[Prompt, str | None]:
        """The prompt, and its text where there is one; without asking whether it fits the context."""
        spans: tuple[MediaSpan, ...] = ()
        boundaries: tuple[int, ...] = ()
        text: str | None = None
        if request.prompt is None:
            marked = self._render_marked(request)
            text = shield.plain(marked)
            self._refuse_absurd(text, "messages")
            if self.expander is not None:
                # The processor encodes the text itself, in one piece: a control text is broken by an invisible space.
                ids, spans = self._expand(shield.plain(marked, "\u200b"), images, videos)
            else:
                ids = self._encode_marked(marked)
            boundaries = self._boundaries(ids, request)
        elif isinstance(request.prompt, str):
            text = request.prompt
            self._refuse_absurd(text, "prompt")
            ids = self._encode_plain(text)
        else:
            ids = self._given_ids(request.prompt)
        if not ids:
            raise InvalidRequest("The prompt is empty.", param="messages" if request.prompt is None else "prompt")
        return Prompt(ids, media=spans, boundaries=boundaries), text

    def place_media(self, request: GenerationRequest) -> tuple[GenerationRequest, list[MediaPart]]:
        """The request with its media where the template can write them, and the media in that order.

        InvalidRequest when the model takes none of their kind. Clips go to models that take only images as frames.
        """
        media = [p for m in request.messages for p in m.parts if isinstance(p, MediaPart)]
        if not media:
            return request, media
        kinds = self.profile.modalities
        for part in media:
            if self.expander is None or not (part.kind in kinds or (part.kind == "video" and "image" in kinds)):
                raise InvalidRequest(
                    f"The model {self.profile.name} takes {', '.join(sorted(kinds))}, no {part.kind}. If the "
                    "checkpoint does, restart the server with --mllm; otherwise serve a multimodal model.",
                    param=part.param,
                    code="unsupported_media",
                )
        request = replace(request, messages=self.template.place_media(request.messages))
        return request, [p for m in request.messages for p in m.parts if isinstance(p, MediaPart)]

    def frames_as_images(
        self, request: GenerationRequest, images: Sequence[Any], clips: Sequence[Clip]
    ) -> tuple[GenerationRequest, Sequence[Any], Sequence[Clip]]:
        """For a model that takes no videos: each becomes its frames, in its place."""
        videos = [clip for clip in clips if isinstance(clip, VideoFrames)]
        if not videos or "video" in self.profile.modalities:
            return request, images, clips
        next_image, next_video = iter(images), iter(videos)
        flat: list[Any] = []
        messages = []
        for message in request.messages:
            parts: list[Part] = []
            for part in message.parts:
                if isinstance(part, TextPart) or part.kind == "audio":
                    parts.append(part)
                elif part.kind == "video":
                    frames = next(next_video).frames
                    flat += frames
                    parts += [MediaPart("image", "", part.param) for _ in frames]
                else:
                    flat.append(next(next_image))
                    parts.append(part)
            messages.append(replace(message, parts=tuple(parts)))
        sounds = [clip for clip in clips if not isinstance(clip, VideoFrames)]
        return replace(request, messages=tuple(messages)), flat, sounds

    def render(self, request: GenerationRequest) -> str:
        """The conversation as text. With tool_choice "none" the model is not shown the tools."""
        return shield.plain(self._render_marked(request))

    def _render_marked(self, request: GenerationRequest, *, add_generation_prompt: bool = True) -> str:
        return self.template.render(
            self._shield.guard(request.messages, is_continued=request.continue_final_message),
            visible_tools(request),
            variables=self.template_variables(request),
            continue_final_message=request.continue_final_message,
            add_generation_prompt=add_generation_prompt,
            keep_reasoning=bool(request.reasoning.keep_earlier),
        )

    @property
    def template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequest(
                f"The model {self.profile.name} has no chat template, so it cannot chat; use /v1/completions with a "
                "text prompt, or a checkpoint that has one.",
                param="messages",
                code="no_chat_template",
            )
        return self._template

    def template_variables(self, request: GenerationRequest) -> dict[str, Any]:
        """Template variables: the server's defaults, under the request's own, under its reasoning controls."""
        self.template.check_variables(request.template_kwargs)
        variables = {**(self.sampling.default_chat_template_kwargs or {}), **request.template_kwargs}
        effort = request.reasoning.effort
        if effort is not None and effort not in _EFFORTS:
            raise InvalidRequest(
                f"reasoning_effort must be one of {', '.join(_EFFORTS)}, not {effort!r}.", param="reasoning_effort"
            )
        enabled = request.reasoning.enabled
        if enabled is None and effort == "none":
            enabled = False
        if enabled is None and isinstance(variables.get("thinking"), bool) and "enable_thinking" not in variables:
            enabled = variables["thinking"]
        if enabled is not None:
            # Families disagree about the variable's name; each ignores the other's.
            variables["enable_thinking"] = variables["thinking"] = enabled
        if effort not in (None, "none"):
            variables["reasoning_effort"] = effort
        return variables

    def context_limit(self, pressure: Pressure = NO_PRESSURE) -> ContextLimit:
        limit = ContextLimit(self.profile.context_tokens, "model_config")
        override = self.limits.effective_context_tokens
        if override is not None and override <= limit.tokens:
            limit = ContextLimit(override, "operator_override")
        if pressure.context_tokens is not None and pressure.context_tokens < limit.tokens:
            limit = ContextLimit(max(1, pressure.context_tokens), "memory")
        return limit

    def _refuse_absurd(self, text: str, param: str) -> None:
        """Megabytes that cannot fit are refused by the number of tokens of a part, rather than encoded for seconds."""
        context = self.context_limit().tokens
        if len(text) <= _MAX_CHARS_PER_TOKEN * context:
            return
        part = text[: _MAX_CHARS_PER_TOKEN * _SAMPLED_TOKENS]
        at_least = len(self.tokenizer.encode(part, add_special_tokens=False)) * len(text) // len(part)
        if at_least > context:
            error = ContextLengthExceeded(num_prompt_tokens=at_least, max_tokens=1, context_tokens=context)
            error.args = (f"{error} (The prompt's length is estimated.)",)
            error.param = param
            raise error

    # ── tokens ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _encode_marked(self, text: str) -> tuple[int, ...]:
        encode = self.tokenizer.encode
        return tuple(i for piece in shield.pieces(text) if piece for i in encode(piece, add_special_tokens=False))

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        """A completion's prompt: the tokenizer adds its own beginning, once, also if the text has it already."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        bos = self.profile.bos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            del ids[0]
        if not ids and bos is not None:
            ids = [bos]
        if not ids and self.profile.eos_token_ids:
            ids = [self.profile.eos_token_ids[0]]
        return tuple(ids)

    def _given_ids(self, prompt: Sequence[int]) -> tuple[int, ...]:
        for i, token_id in enumerate(prompt):
            if not isinstance(token_id, int) or not 0 <= token_id < self.profile.vocab_size:
                raise InvalidRequest(
                    f"Token {token_id!r} does not exist; this model's tokens are 0 to {self.profile.vocab_size - 1}.",
                    param=f"prompt.{i}",
                )
        return tuple(prompt)

    def _expand(
        self, text: str, images: Sequence[Any], videos: Sequence[Any]
    ) -> tuple[tuple[int, ...], tuple[MediaSpan, ...]]:
        assert self.expander is not None
        try:
            ids, spans = self.expander.expand(text, images, videos)
        except InvalidRequest:
            raise
        except Exception as error:  # a model's processor is foreign code and meets pictures of any shape
            log.warning("the media processor failed", exc_info=True)
            raise InvalidRequest(
                f"The model's processor cannot take these media: {str(error) or type(error).__name__}.",
                param="messages",
                code="invalid_media",
            ) from error
        return tuple(ids), tuple(spans)

    def _boundaries(self, ids: tuple[int, ...], request: GenerationRequest) -> tuple[int, ...]:
        """Positions where a turn has ended: after end-of-turn tokens, else before start-of-turn tokens, else where the
        conversation without its last message, and without the generation prompt, ends."""
        found = [i + 1 for i, token_id in enumerate(ids) if token_id in self._turn_ends]
        if not found:
            found = [i for i, token_id in enumerate(ids) if token_id in self._turn_starts and i > 0]
        if not found and len(ids) > 256:
            found = self._boundaries_by_rendering(ids, request)
        return tuple(found)

    def _boundaries_by_rendering(self, ids: tuple[int, ...], request: GenerationRequest) -> list[int]:
        found = set()
        for messages in (request.messages[:1], request.messages[:-1], request.messages):
            try:
                text = self._render_marked(
                    replace(request, messages=messages, continue_final_message=False), add_generation_prompt=False
                )
            except InvalidRequest:  # a part of a conversation need not be one
                continue
            part = self._encode_marked(text)
            if 0 < len(part) < len(ids) and ids[: len(part)] == part:
                found.add(len(part))
        return sorted(found)

    # ── the context ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _fit(self, request: GenerationRequest, num_prompt: int, context: ContextLimit, pressure: Pressure) -> int:
        """The completion's token limit; the one place where the context length is checked."""
        asked = request.max_tokens
        cap = self.limits.max_request_tokens
        if asked is not None and cap is not None and asked > cap and not request.clamp_max_tokens:
            raise InvalidRequest(
                f"max_tokens is {asked}, but this server allows at most {cap} a request.", param="max_tokens"
            )
        room = context.tokens - num_prompt
        if room < 1 or (asked is not None and asked > room and not request.clamp_max_tokens):
            error = ContextLengthExceeded(
                num_prompt_tokens=num_prompt, max_tokens=asked or 1, context_tokens=context.tokens
            )
            if context.source == "memory":
                reason = pressure.reason or "memory is short"
                error.args = (f"{error} The context is reduced for the moment because {reason}.",)
            if request.prompt is not None:
                error.param = "prompt"
            raise error
        return min(asked if asked is not None else self.limits.max_tokens, room, cap or room)


def visible_tools(request: GenerationRequest) -> tuple[Tool, ...]:
    return () if request.tool_choice.mode == "none" else request.tools


def _content(token: Any) -> str:
    return token if isinstance(token, str) else str(getattr(token, "content", token))
