"""A multimodal model without a family file of its own: its processor and its merging code are asked for everything.

Whether rows of such a model can be mixed was never compared with mlx-vlm, so it is served one request at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.generate.diffusion import is_diffusion_model
from mlx_vlm.utils import process_inputs

from ..errors import InvalidRequest, ModelLoadError
from .base import Prompt
from .family import Family, Prepared
from .mrope import GRIDS, MRopeState, ThreeAxisFamily
from .piecewise import why_not_at_all, why_whole
from .whole_family import WholeFamily

if TYPE_CHECKING:
    from PIL.Image import Image

    from .profile import ModelProfile

_PLACEHOLDERS = ("<image>", "<|image|>", "<|image_pad|>", "[IMG]", "<IMG_CONTEXT>", "<|image_1|>", "<im_patch>")

# What processors return beside the encoder's inputs.
_OF_THE_TEXT = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids", "labels", "num_crops", "rows", "cols"}
)


class GenericFamily(Family):
    """One picture at a time through the model's own processor, with nothing but the placeholder as text."""

    runs_batched = False

    @property
    def placeholders(self) -> Mapping[str, str]:
        """What the chat template writes for a picture, of the names that processors use."""
        named = [getattr(self.processor, name, None) for name in ("image_token", "boi_token")]
        template = self.profile.chat_template or ""
        for text in (*named, self.image_token, *_PLACEHOLDERS):
            if isinstance(text, str) and text and text in template:
                return {"image": text}
        return {"image": self.image_token}

    def prepare_image(self, image: Image) -> Prepared:
        try:
            out = process_inputs(
                self.processor, prompts=[self.placeholders["image"]], images=[image], add_special_tokens=False
            )
        except Exception as error:  # processors of a hundred makers
            raise InvalidRequest(
                f"The processor of {self.profile.name} cannot take this image ({error}).",
                param="messages",
                code="unsupported_media",
            ) from error
        token_ids = np.asarray(out["input_ids"]).reshape(-1).tolist()
        media_ids = self.media_token_ids("image")
        inputs = {k: np.asarray(v) for k, v in out.items() if k not in _OF_THE_TEXT and not isinstance(v, str | int)}
        return Prepared(
            text=self.tokenizer.decode(token_ids, skip_special_tokens=False, spaces_between_special_tokens=False),
            num_media_tokens=sum(t in media_ids for t in token_ids),
            inputs={k: v for k, v in inputs.items() if v.dtype != object},
        )


class GenericMRopeFamily(GenericFamily, ThreeAxisFamily):
    """The same for models that compute positions from grids: asked once a prompt, kept outside the model."""

    def positions(self, model: Any, prompt: Prompt) -> MRopeState:
        tokens = mx.array([prompt.token_ids])
        grids = {
            name: mx.array(np.concatenate([np.asarray(s.inputs[name]) for s in prompt.media if name in s.inputs]))
            for name in GRIDS
            if any(name in s.inputs for s in prompt.media)
        }
        found, delta = model.language_model.get_rope_index(tokens, **grids, attention_mask=mx.ones_like(tokens))
        axes = np.asarray(found, dtype=np.int32)
        if axes.ndim == 2:
            axes = np.broadcast_to(axes, (3, *axes.shape))
        return MRopeState(positions=axes[:, 0], delta=int(np.asarray(delta).reshape(-1)[0]))


class GenericWholeFamily(WholeFamily):
    """A model whose prompts cannot be put together piece by piece: `reason` says what was seen.

    What it remembers between calls is unknown, so a row ends before the next one begins.
    """

    may_interleave = False

    @property
    def placeholder(self) -> str:
        return GenericFamily(self.profile, self.config, self.processor, self.tokenizer).placeholders["image"]


def choose_generic(
    model: Any, profile: ModelProfile, config: Mapping[str, Any], processor: Any, tokenizer: Any
) -> Family | WholeFamily:
    """The family of a model without a file; refuses models that mlx-vlm itself could not generate with."""
    family = find_generic_family(model, profile.name, profile.model_type)(profile, config, processor, tokenizer)
    whole = GenericWholeFamily(profile, config, processor, tokenizer)
    reason = why_whole(model, family, whole)
    if failure := why_not_at_all(model, whole):
        raise ModelLoadError(f"{profile.name} ({profile.model_type}) cannot answer about pictures: {failure}.")
    if reason is None:
        return family
    whole.reason = reason
    return whole


def find_generic_family(model: Any, name: str, model_type: str) -> type[Family]:
    """A family for a model without a file; refuses models that mlx-vlm itself could not generate with."""
    language_model = getattr(model, "language_model", None)
    if is_diffusion_model(model):
        raise ModelLoadError(
            f"{name} ({model_type}) writes its answers by diffusion, not token by token, which this server cannot do; "
            "choose another model."
        )
    if language_model is None or not hasattr(model, "get_input_embeddings"):
        raise ModelLoadError(
            f"{name} ({model_type}) does not generate text from embeddings, so neither mlx-vlm nor this server can "
            "answer with it; choose another model."
        )
    return GenericMRopeFamily if hasattr(language_model, "get_rope_index") else GenericFamily
