"""Llama 3.2 Vision: some layers look at the encoded pictures and at nothing else (cross-attention).

Prompts without pictures pass these layers by, as the model was trained; mlx-vlm (0.7.10) would let them look at their
own queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.base import create_attention_mask

from ..whole_family import WholeFamily

if TYPE_CHECKING:
    from PIL.Image import Image

_STATES = "cross_attention_states"


class ModelFamily(WholeFamily):
    reason = "some of its layers read the pictures by cross-attention"

    def process(self, text: str, images: list[Image]) -> Mapping[str, Any]:
        # Asked directly: through mlx-vlm's helper the tokenizer adds a second beginning token to the template's.
        out: Mapping[str, Any] = self.processor(text=[text], images=images, add_special_tokens=False)
        return out

    def first_pass(
        self, model: Any, token_ids: Sequence[int], inputs: Mapping[str, np.ndarray], cache: list[Any]
    ) -> tuple[mx.array, Mapping[str, Any]]:
        if inputs:
            return super().first_pass(model, token_ids, inputs, cache)
        return _text_logits(model.language_model, mx.array([list(token_ids)]), cache), {}

    def step(self, model: Any, tokens: mx.array, cache: list[Any], carried: Mapping[str, Any]) -> mx.array:
        if carried.get(_STATES) is not None:
            return super().step(model, tokens, cache, carried)
        return _text_logits(model.language_model, tokens, cache)


def _text_logits(language_model: Any, tokens: mx.array, cache: list[Any]) -> mx.array:
    """Logits [1, V] behind tokens [1, L], by the self-attention layers alone."""
    body = language_model.model
    looking = set(language_model.config.cross_attention_layers)
    reading = [i for i in range(len(body.layers)) if i not in looking]
    h = body.embed_tokens(tokens)
    mask = create_attention_mask(h, cache[reading[0]])
    for i in reading:
        h = body.layers[i](h, mask=mask, cache=cache[i])
    logits: mx.array = language_model.lm_head(body.norm(h[:, -1:]))
    return logits[:, -1, :]
