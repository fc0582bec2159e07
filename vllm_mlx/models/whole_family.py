"""What differs between models whose prompts are read whole, as one object; `families/<model_type>.py` overrides.

The answers given here are how mlx-vlm's own generator asks any model: its processor gets the text and the pictures
together, its merging code makes embeddings of the whole prompt, one pass computes them, then it goes token by token.
`read_*` run on worker threads and make numpy; everything else runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx_vlm.utils
import numpy as np

from ..errors import InvalidRequest

if TYPE_CHECKING:
    from PIL.Image import Image

    from .profile import ModelProfile

# What processors return beside the model's inputs.
_OF_THE_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels"})

# For checkpoints without a chat template that answer instructions about a picture; earlier turns are text to them.
INSTRUCTIONS = (
    "{% for message in messages %}{% if message.content is not string %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '' if loop.first else '\n' }}{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class WholePrompt:
    """A prompt as the engine counts it, and what the model is given for it.

    `token_ids` has a valid id for each token that the model keeps keys and values of; `inputs` are the processor's
    arrays, with `input_ids` [L] among them where the model is given other ids than the engine. Empty without pictures.
    """

    token_ids: tuple[int, ...]
    inputs: Mapping[str, np.ndarray] = field(default_factory=dict)


class WholeFamily:
    """A model of which nothing is known but that mlx-vlm can generate with it."""

    # The end of the sentence "... runs one request at a time and without prefix cache: ...".
    reason = "its pictures are put into a prompt by code of its own"
    # How many pictures a conversation may have; None for any number.
    max_images: int | None = None
    # The chat template of checkpoints without one.
    template = ""
    # False where the engine's caches are exactly what the model's attention wants.
    keeps_own_cache = True
    # False where the model object itself remembers something of the last prompt: rows then wait for each other.
    may_interleave = True

    def __init__(self, profile: ModelProfile, config: Mapping[str, Any], processor: Any, tokenizer: Any) -> None:
        self.profile = profile
        self.config = config
        self.processor = processor
        self.tokenizer = tokenizer

    @classmethod
    def applies(cls, model: Any) -> bool:
        """Whether the loaded model is one of these at all: some model types are so only with certain settings."""
        return True

    @classmethod
    def load_processor(cls, profile: ModelProfile, *, trust_remote_code: bool) -> Any:
        """mlx-vlm's processor of the model's folder."""
        return mlx_vlm.utils.load_processor(profile.path, add_detokenizer=False, trust_remote_code=trust_remote_code)

    # -- worker threads ------------------------------------------------------------------------------------------------

    @property
    def placeholder(self) -> str:
        """The text that stands for a picture in a rendered prompt."""
        return str(getattr(self.processor, "image_token", "<image>"))

    def read_text(self, text: str) -> WholePrompt:
        """A prompt without pictures."""
        bos = getattr(self.tokenizer, "bos_token", None)
        has_bos = bool(bos and text.startswith(bos))
        return WholePrompt(tuple(self.tokenizer.encode(text, add_special_tokens=not has_bos)))

    def read_images(self, text: str, images: Sequence[Image]) -> WholePrompt:
        """A prompt in which each of `images` has its placeholder."""
        return self.counted(self.process(text, list(images)))

    def process(self, text: str, images: list[Image]) -> Mapping[str, Any]:
        """What the processor makes of text and pictures."""
        out: Mapping[str, Any] = mlx_vlm.utils.process_inputs(
            self.processor, prompts=[text], images=images, add_special_tokens=False
        )
        return out

    def counted(self, out: Mapping[str, Any], lengths: Sequence[int] | None = None) -> WholePrompt:
        """The prompt of a processor's output.

        Ids below zero stand for pictures: with `lengths`, each for as many tokens as its picture has.
        """
        given = np.asarray(out["input_ids"]).reshape(-1)
        inputs = {k: np.asarray(v) for k, v in out.items() if k not in _OF_THE_TEXT and v is not None}
        if not (given < 0).any():
            return WholePrompt(tuple(given.tolist()), inputs)
        stand_in = getattr(self.tokenizer, "pad_token_id", None) or 0
        sizes = iter(lengths) if lengths is not None else None
        token_ids: list[int] = []
        for token in given.tolist():
            token_ids += [token] if token >= 0 else [stand_in] * (1 if sizes is None else next(sizes))
        return WholePrompt(tuple(token_ids), {**inputs, "input_ids": given.astype(np.int32)})

    def refuse(self, text: str) -> InvalidRequest:
        return InvalidRequest(f"{self.profile.name} {text}", param="messages", code="unsupported_media")

    # -- MLX thread ----------------------------------------------------------------------------------------------------

    def first_pass(
        self, model: Any, token_ids: Sequence[int], inputs: Mapping[str, np.ndarray], cache: list[Any]
    ) -> tuple[mx.array, Mapping[str, Any]]:
        """Logits [1, V] behind the whole prompt, and what every later step is to be given."""
        tokens = _given(token_ids, inputs)
        rest = self._rest(inputs)
        found = self.embedded(model, token_ids, inputs)
        embeddings = found.inputs_embeds
        extra = {k: v for k, v in found.to_dict().items() if k != "inputs_embeds" and v is not None}
        keywords = {**rest, **self.renamed(extra, embeddings.dtype)}
        out = model.language_model(tokens, inputs_embeds=embeddings, cache=cache, **keywords)
        return out.logits[:, -1, :], self.carried(out)

    def embedded(self, model: Any, token_ids: Sequence[int], inputs: Mapping[str, np.ndarray]) -> Any:
        """What the model's merging code makes of a prompt: `inputs_embeds` [1, L, hidden], and whatever else."""
        tokens, pixels = _given(token_ids, inputs), inputs.get("pixel_values")
        return model.get_input_embeddings(
            tokens, None if pixels is None else mx.array(pixels), mask=mx.ones_like(tokens), **self._rest(inputs)
        )

    def _rest(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        return self.keywords({k: v for k, v in inputs.items() if k not in ("input_ids", "pixel_values")})

    def keywords(self, inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The processor's other outputs as the model takes them."""
        return {k: mx.array(v) for k, v in inputs.items()}

    def renamed(self, extra: dict[str, Any], dtype: mx.Dtype) -> dict[str, Any]:
        """What the merging code returns beside embeddings, as the language model takes it."""
        return extra

    def carried(self, out: Any) -> Mapping[str, Any]:
        """What of a pass's output the next pass needs: the encoded picture, where later tokens look at it again."""
        for name in ("cross_attention_states", "encoder_outputs"):
            if (value := getattr(out, name, None)) is not None:
                return {name: value}
        return {}

    def step(self, model: Any, tokens: mx.array, cache: list[Any], carried: Mapping[str, Any]) -> mx.array:
        """Logits [1, V] after one more token [1, 1]."""
        logits: mx.array = model.language_model(tokens, cache=cache, **carried).logits[:, -1, :]
        return logits


def _given(token_ids: Sequence[int], inputs: Mapping[str, np.ndarray]) -> mx.array:
    """int32 [1, L]: the ids that the model is given."""
    return mx.array(inputs.get("input_ids", np.array(token_ids, dtype=np.int32)))[None]


def numbered(text: str, placeholder: str) -> str:
    """`text` with its pictures as <|image_1|>, <|image_2|> and so on."""
    first, *rest = text.split(placeholder)
    return first + "".join(f"<|image_{i}|>{piece}" for i, piece in enumerate(rest, start=1))
