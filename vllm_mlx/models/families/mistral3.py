"""Mistral 3 and Pixtral: a picture keeps its shape; break tokens divide its rows of tokens, an end token closes it.

The language models of Ministral 3 and Mistral 4 scale queries by position. mlx-vlm (0.7.10) scales all rows of a batch
by the first row's; with more than one row the layers are therefore called from here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.base import create_attention_mask

from ..family import Family, Prepared

if TYPE_CHECKING:
    from PIL.Image import Image


class ModelFamily(Family):
    def prepare_image(self, image: Image) -> Prepared:
        processor = self.processor
        patch = int(processor.patch_size) * int(processor.spatial_merge_size)
        out = processor.image_processor([[image]], patch_size=patch)
        sizes = np.asarray(out["image_sizes"]).reshape(-1, 2)
        rows, columns = (int(n) // patch for n in sizes[0])
        row = processor.image_token * columns
        pixels = np.asarray(out["pixel_values"])
        return Prepared(
            text=processor.image_break_token.join([row] * rows) + processor.image_end_token,
            num_media_tokens=rows * columns,
            inputs={"pixel_values": pixels.reshape(-1, *pixels.shape[-3:]), "image_sizes": sizes},
        )

    def decode(
        self,
        model: Any,
        tokens: mx.array,
        counts: Sequence[int],
        cache: list[Any],
        positions: Sequence[Any | None],
    ) -> mx.array:
        language_model = model.language_model
        if len(counts) == 1 or language_model.model_type not in ("ministral3", "mistral4"):
            return super().decode(model, tokens, counts, cache, positions)
        body = language_model.model
        rope = body.config.rope_parameters
        h = body.embed_tokens(tokens)
        block = mx.floor(mx.array(list(counts)) / rope["original_max_position_embeddings"])
        scale = (1 + rope["llama_4_scaling_beta"] * mx.log(1 + block))[:, None, None, None].astype(h.dtype)
        masks: dict[bool, Any] = {}
        for layer, entry in zip(body.layers, cache, strict=True):
            slides = bool(getattr(layer, "use_sliding", False))
            if slides not in masks:
                window = body.sliding_window if slides else None
                masks[slides] = create_attention_mask(h, entry, window_size=window)
            h = layer(h, scale, masks[slides], cache=entry)
        h = body.norm(h)
        tied = language_model.config.tie_word_embeddings
        logits: mx.array = body.embed_tokens.as_linear(h) if tied else language_model.lm_head(h)
        return logits
