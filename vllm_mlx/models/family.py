"""What differs between multimodal model types, as one object with sane answers; `families/<model_type>.py` overrides.

`prepare_*` run on worker threads and make numpy; everything else runs on the MLX thread. A family holds no sequence's
state: positions that depend on media travel in `PromptState`.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from ..errors import EngineError, InvalidRequest
from .base import Features, Prompt
from .span import MediaSpan, SoundClip, VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image

    from .profile import ModelProfile
    from .whole_family import WholeFamily


@dataclass(frozen=True)
class Prepared:
    """One piece of media, ready for the encoder.

    `text` takes the place of the placeholder in the prompt; `num_media_tokens` of its tokens get features.
    """

    text: str
    num_media_tokens: int
    inputs: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.inputs.values())


class Family:
    """A model whose images are runs of one placeholder token, with plain positions."""

    # False for families nobody compared row by row with mlx-vlm; they are served one request at a time.
    runs_batched = True

    @property
    def atomic_spans(self) -> bool:
        """Whether a span's tokens see each other in both directions, and so must be prefilled in one chunk."""
        return False

    def __init__(self, profile: ModelProfile, config: Mapping[str, Any], processor: Any, tokenizer: Any) -> None:
        self.profile = profile
        self.config = config
        self.processor = processor
        self.tokenizer = tokenizer

    # -- worker threads ------------------------------------------------------------------------------------------------

    @property
    def placeholders(self) -> Mapping[str, str]:
        """For each kind of media, the text that stands for one piece of it in a rendered prompt."""
        return {"image": self.image_token}

    @property
    def image_token(self) -> str:
        """Text of the token whose embedding the image features replace."""
        token = getattr(self.processor, "image_token", None)
        if isinstance(token, str):
            return token
        token_id = self.profile.media_token_ids.get("image")
        if token_id is not None:
            return str(self.tokenizer.convert_ids_to_tokens(token_id))
        return "<image>"

    def media_token_ids(self, kind: str) -> frozenset[int]:
        """Ids of the tokens that get features."""
        token_id = self.profile.media_token_ids.get(kind)
        if token_id is None:
            token_id = self.tokenizer.convert_tokens_to_ids(self.placeholders[kind])
        return frozenset({token_id})

    def prepare_image(self, image: Image) -> Prepared:
        raise NotImplementedError

    def prepare_video(self, video: VideoFrames) -> Prepared:
        raise InvalidRequest(f"{self.profile.name} does not take video.", param="messages", code="unsupported_media")

    def prepare_audio(self, clip: SoundClip) -> Prepared:
        raise InvalidRequest(f"{self.profile.name} does not take sound.", param="messages", code="unsupported_media")

    # -- MLX thread ----------------------------------------------------------------------------------------------------

    def encode(self, model: Any, span: MediaSpan) -> Features:
        """Embeddings of the span's tokens as the model's own merging code makes them."""
        tokens = mx.array(span.inputs["input_ids"])[None]
        pixels = span.inputs.get("pixel_values")
        rest = {k: mx.array(v) for k, v in span.inputs.items() if k not in ("input_ids", "pixel_values")}
        out = model.get_input_embeddings(
            tokens, None if pixels is None else mx.array(pixels), mask=mx.ones_like(tokens), **rest
        )
        embeddings = out.inputs_embeds[0]
        if embeddings.shape[0] != span.length:
            raise EngineError(
                f"The encoder of {self.profile.name} made {embeddings.shape[0]} features, "
                f"but the {span.kind} has {span.length} tokens in the prompt."
            )
        return Features(embeddings)

    def embed(self, model: Any, tokens: mx.array) -> tuple[mx.array, dict[str, Any]]:
        """Embeddings [1, L, hidden] of text tokens, and what else the language model wants beside them."""
        out = model.get_input_embeddings(tokens, None, mask=None)
        extra = {k: v for k, v in out.to_dict().items() if v is not None and k not in _NOT_PASSED_ON}
        return out.inputs_embeds, extra

    def positions(self, model: Any, prompt: Prompt) -> Any | None:
        """Position state of a prompt with media, on the host; None when a position is just a count."""
        return None

    def prefill_inputs(
        self, start: int, length: int, positions: Any | None, overlaps: Sequence[Overlap], dtype: mx.Dtype
    ) -> dict[str, Any]:
        """Keyword arguments of the language model for a chunk, beside embeddings and cache."""
        return {}

    def decode(
        self,
        model: Any,
        tokens: mx.array,
        counts: Sequence[int],
        cache: list[Any],
        positions: Sequence[Any | None],
    ) -> mx.array:
        """Logits [R, 1, V] after one token of each row."""
        logits: mx.array = model.language_model(tokens, cache=cache, **self.decode_inputs(counts, positions)).logits
        return logits

    def decode_inputs(self, counts: Sequence[int], positions: Sequence[Any | None]) -> dict[str, Any]:
        """Keyword arguments of the language model for one token of each row, `counts` tokens from its row's start."""
        return {}


# `attention_mask_4d` is all ones for one unpadded row, and positions are the family's own business.
_NOT_PASSED_ON = frozenset({"inputs_embeds", "position_ids", "rope_deltas", "attention_mask_4d", "attention_mask"})


@dataclass(frozen=True)
class Overlap:
    """Where a span meets a chunk: `chunk[at : at + n]` holds `features[first : first + n]`."""

    at: int
    first: int
    n: int
    features: Features
    kind: str = "image"


@dataclass(frozen=True)
class PromptState:
    """What a prompt with media needs at every call: where its spans lie, and the family's positions."""

    ranges: tuple[tuple[int, int], ...]
    positions: Any | None
    kinds: tuple[str, ...]

    def overlaps(self, features: Mapping[int, Features], start: int, length: int) -> list[Overlap]:
        """Where spans meet the chunk [start, start + length), in order."""
        found = []
        for index in sorted(features):
            span_start, span_end = self.ranges[index]
            begin, end = max(span_start, start), min(span_end, start + length)
            if begin < end:
                at, first = begin - start, begin - span_start
                found.append(Overlap(at, first, end - begin, features[index], self.kinds[index]))
        return found


def find_family(model_type: str) -> type[Family] | type[WholeFamily] | None:
    """The class `ModelFamily` of `families/<model_type>.py`; None when there is no such file."""
    name = f"{__package__}.families.{model_type.replace('-', '_').replace('.', '_')}"
    if importlib.util.find_spec(name) is None:
        return None
    family: type[Family] | type[WholeFamily] = importlib.import_module(name).ModelFamily
    return family
