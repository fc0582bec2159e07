"""May a prompt with pictures be put together piece by piece? Asked of each model without a family file, when it loads.

One small prompt is embedded twice: whole, by the model's own merging code, and from pieces, as `GenericFamily` does for
chunks and the prefix cache. Only if both are the same is the model served from pieces.
MLX thread; no language model runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache
from PIL import Image

from .base import Features
from .family import Family, PromptState
from .media import MediaProcessor
from .mrope import ThreeAxisFamily
from .whole_family import WholeFamily

_OF_POSITION = frozenset({"position_ids", "rope_deltas"})
_MASKS = frozenset({"attention_mask", "attention_mask_4d"})


def why_whole(model: Any, family: Family, whole: WholeFamily) -> str | None:
    """The end of the sentence "... runs without prefix cache: ..."; None if pieces will do."""
    if any(getattr(part, "no_chunked_prefill", False) for part in (model, model.language_model)):
        return "mlx-vlm too computes its prompts in one pass only"
    try:
        return _difference(model, family, whole)
    except Exception as error:  # code of a hundred makers, asked for what its own caller never asks
        return f"its code cannot be asked for one picture alone ({type(error).__name__})"


def why_not_at_all(model: Any, whole: WholeFamily) -> str | None:
    """What is in the way of any answer about a picture. The answer is traced, not computed."""
    try:
        prompt = whole.read_images(*_question(whole))
        cache = make_prompt_cache(model.language_model)
        logits, _ = whole.first_pass(model, prompt.token_ids, prompt.inputs, list(cache))
    except Exception as error:  # as above
        return f"mlx-vlm's own code fails with one ({type(error).__name__}: {error})"
    return None if logits.ndim == 2 else "it makes no logits"


def _question(whole: WholeFamily) -> tuple[str, list[Image.Image]]:
    noise = np.random.default_rng(1).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    return f"Look: {whole.placeholder} there.", [Image.fromarray(noise)]


def _difference(model: Any, family: Family, whole: WholeFamily) -> str | None:
    text, pictures = _question(whole)
    prompt = whole.read_images(text, pictures)
    media = MediaProcessor(family, family.tokenizer)
    token_ids, spans = media.expand(text, pictures, add_special_tokens=False)
    given = prompt.inputs.get("input_ids", np.array(prompt.token_ids)).tolist()
    if given[-len(token_ids) :] != list(token_ids):  # in front, a processor may add a beginning
        return "its processor writes one picture otherwise than among words"
    found = whole.embedded(model, prompt.token_ids, prompt.inputs)
    extra = {k: v for k, v in found.to_dict().items() if k != "inputs_embeds" and v is not None}
    if more := sorted(k for k, v in extra.items() if not _is_plain(k, v, family)):
        return f"its merging code makes {', '.join(more)} of a whole prompt"
    embeddings, _ = family.embed(model, mx.array([token_ids]))
    ranges = tuple((span.start, span.end) for span in spans)
    features = {i: family.encode(model, span) for i, span in enumerate(spans)}
    pieces = _overlaid(embeddings, PromptState(ranges, None, tuple(s.kind for s in spans)), features)
    return None if _agree(found.inputs_embeds[:, -len(token_ids) :], pieces) else "its pictures depend on the words"


def _is_plain(name: str, value: Any, family: Family) -> bool:
    """What a prompt without pictures has as well, or the family sees to itself."""
    if name in _OF_POSITION:
        return isinstance(family, ThreeAxisFamily)
    return name in _MASKS and isinstance(value, mx.array) and bool(mx.all(value == 1).item())


def _overlaid(embeddings: mx.array, state: PromptState, features: Mapping[int, Features]) -> mx.array:
    merged = mx.array(embeddings)
    for o in state.overlaps(features, 0, embeddings.shape[1]):
        merged[:, o.at : o.at + o.n] = o.features.embeddings[o.first : o.first + o.n].astype(embeddings.dtype)
    return merged


def _agree(first: mx.array, second: mx.array) -> bool:
    if first.shape != second.shape:
        return False
    gap, size = (mx.abs(x.astype(mx.float32)).max() for x in (first - second, first))
    return bool((gap <= 0.02 * size).item())
