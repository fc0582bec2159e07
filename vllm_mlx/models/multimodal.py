"""Multimodal models: mlx-vlm's model classes behind `LanguageModel`. MLX thread only.

Neither mlx-vlm's generator nor the position state it keeps on the model is used: embeddings, positions and deepstack
features are handed to the language model explicitly at every call, so rows of different requests can be mixed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx_vlm.models.activations
import mlx_vlm.utils
from mlx_vlm.models.cache import make_prompt_cache

from ..errors import ModelLoadError
from . import prompt_attention, row_kernels
from .adapters import AdapterBank
from .base import Features, Prompt
from .cache_view import SeesWholeSpans
from .family import Family, Overlap, PromptState, find_family
from .grouped import RowWindow, group_mixers, ungroup_mixers
from .loader import LoadedModel
from .media import MediaProcessor
from .profile import ModelProfile, read_json
from .span import MediaSpan
from .stack import loading, with_precision
from .text import why_single_row
from .weights import Precision, apply_precision
from .whole import WholeMedia, WholePromptModel
from .whole_family import WholeFamily


class MultimodalModel:
    """`LanguageModel` over an mlx-vlm model."""

    def __init__(self, model: Any, family: Family, profile: ModelProfile) -> None:
        self._model = model
        self._family = family
        self.atomic_spans = family.atomic_spans
        reason = why_single_row(self.make_cache(), profile.model_type)
        if reason is None and not family.runs_batched:
            reason = f"{profile.model_type} runs one request at a time: its batching with images is not verified"
        if reason:
            profile = replace(profile, runs_batched=False, notes=(*profile.notes, reason))
        self.profile = profile
        window = RowWindow()
        self.can_group = profile.runs_batched and group_mixers(model.language_model, window)
        self.adapters = AdapterBank(model.language_model, window)

    def ungroup(self) -> None:
        ungroup_mixers(self._model.language_model)
        self.can_group = False

    def make_cache(self) -> list[Any]:
        return list(make_prompt_cache(self._model.language_model))

    def encode(self, span: MediaSpan) -> Features:
        return self._family.encode(self._model, span)

    def prompt_state(self, prompt: Prompt) -> PromptState | None:
        if not prompt.media:
            return None
        ranges = tuple((span.start, span.end) for span in prompt.media)
        kinds = tuple(span.kind for span in prompt.media)
        return PromptState(ranges, self._family.positions(self._model, prompt), kinds)

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> mx.array:
        length = tokens.shape[1]
        embeddings, extra = self._family.embed(self._model, tokens)
        met = state.overlaps(features, start, length) if state is not None else []
        if met:
            embeddings = _overlay(embeddings, met)
            if self.atomic_spans and length > 1:
                spans = [(o.at, o.n) for o in met if o.kind != "audio"]  # sound is heard in one direction
                cache = [SeesWholeSpans(entry, spans) for entry in cache]
        positions = state.positions if state is not None else None
        inputs = self._family.prefill_inputs(start, length, positions, met, embeddings.dtype)
        out = self._model.language_model(tokens, inputs_embeds=embeddings, cache=cache, **extra, **inputs)
        logits: mx.array = out.logits
        return logits

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        axes = [s.positions if s is not None else None for s in states]
        return self._family.decode(self._model, tokens, positions, cache, axes)[:, -1, :]

    def close(self) -> None:
        self._model = None
        self.adapters.close()


def _overlay(embeddings: mx.array, met: Sequence[Overlap]) -> mx.array:
    """Token embeddings [1, L, hidden] with features in place of the placeholders'."""
    pieces: list[mx.array] = []
    end = 0
    for o in met:
        if o.at > end:
            pieces.append(embeddings[:, end : o.at])
        pieces.append(o.features.embeddings[None, o.first : o.first + o.n].astype(embeddings.dtype))
        end = o.at + o.n
    if end < embeddings.shape[1]:
        pieces.append(embeddings[:, end:])
    return mx.concatenate(pieces, axis=1)


def load_multimodal(profile: ModelProfile, precision: Precision, *, trust_remote_code: bool) -> LoadedModel:
    """Load a checkpoint with its encoders through mlx-vlm."""
    config = read_json(profile.path / "config.json")
    if config.get("model_file") and not trust_remote_code:
        # mlx-vlm would run the file unasked.
        raise ModelLoadError(
            f"{profile.name} brings its own Python code; serve it with --trust-remote-code if you trust its source."
        )
    row_kernels.install(mlx_vlm.models.activations)
    prompt_attention.install()
    with loading(profile):
        model = mlx_vlm.utils.load_model(profile.path, lazy=True, trust_remote_code=trust_remote_code)
        apply_precision(model, precision)
        # Importing the model's module above is what makes transformers find mlx-vlm's torch-free processor.
        family_class = find_family(profile.model_type)
        source = family_class if family_class is not None and issubclass(family_class, WholeFamily) else WholeFamily
        processor = source.load_processor(profile, trust_remote_code=trust_remote_code)
    tokenizer = getattr(processor, "tokenizer", processor)
    if profile.chat_template and not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = profile.chat_template
    profile = with_precision(profile, model, precision.note)
    if family_class is None or (issubclass(family_class, WholeFamily) and not family_class.applies(model)):
        from .generic import choose_generic

        with loading(profile):
            family = choose_generic(model, profile, config, processor, tokenizer)
    else:
        family = family_class(profile, config, processor, tokenizer)
    if isinstance(family, WholeFamily):
        return _load_whole(model, family, profile)
    profile = replace(profile, modalities=frozenset({"text", *family.placeholders}))
    adapter = MultimodalModel(model, family, profile)
    return LoadedModel(
        model=adapter,
        tokenizer=tokenizer,
        processor=processor,
        profile=adapter.profile,
        media=MediaProcessor(family, tokenizer),
    )


def _load_whole(model: Any, family: WholeFamily, profile: ModelProfile) -> LoadedModel:
    """A model whose prompts are read whole, with a chat template of ours where it has none."""
    if not profile.chat_template and family.template:
        profile = replace(profile, chat_template=family.template)
        family.tokenizer.chat_template = family.template
    adapter = WholePromptModel(model, family, replace(profile, modalities=frozenset({"text", "image"})))
    return LoadedModel(
        model=adapter,
        tokenizer=family.tokenizer,
        processor=family.processor,
        profile=adapter.profile,
        media=WholeMedia(family),
    )
