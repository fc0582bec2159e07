"""Models whose prompts are read whole: what mlx-vlm can run and this engine can neither cut into chunks nor batch.

They are served one request at a time, without a prefix cache: `prefill` only notes its tokens, and the first decode
step computes the prompt with its pictures by mlx-vlm's own code. MLX thread; `WholeMedia` worker threads.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache

from ..errors import EngineError, InvalidRequest
from .adapters import AdapterBank
from .base import Features, Prompt
from .grouped import RowWindow
from .media import content_hash
from .profile import ModelProfile
from .span import Clip, MediaSpan
from .whole_family import WholeFamily

if TYPE_CHECKING:
    from PIL.Image import Image


log = logging.getLogger(__name__)


@dataclass
class WholeState:
    """Of one sequence: what its first pass needs, and what that left for later ones. Mutable; MLX thread."""

    token_ids: tuple[int, ...]
    inputs: Mapping[str, np.ndarray]
    later: list[int] = field(default_factory=list)  # tokens behind the prompt, noted when a preempted row comes back
    carried: Mapping[str, Any] | None = None  # None until the prompt is computed


class OwnCache:
    """All of mlx-vlm's cache objects of one row, as a single part into which the engine does not look."""

    def __init__(self, entries: list[Any]) -> None:
        self.entries = entries

    @property
    def state(self) -> list[Any]:
        return [entry.state for entry in self.entries if not entry.empty()]


class _NoLogits:
    """In place of a prompt's logits, which no pass has computed yet."""

    def __getitem__(self, index: object) -> mx.array:
        raise EngineError("This model sees its prompt as a whole and has no log-probabilities of its tokens.")


class WholePromptModel:
    """`LanguageModel` over such an mlx-vlm model."""

    atomic_spans = False
    can_group = False

    def __init__(self, model: Any, family: WholeFamily, profile: ModelProfile) -> None:
        self._model = model
        self._family = family
        self.adapters = AdapterBank(model.language_model, RowWindow())
        notes = [f"{profile.model_type} runs one request at a time and without prefix cache: {family.reason}"]
        if family.keeps_own_cache:
            notes.append(f"{profile.model_type} keeps keys and values as mlx-vlm does: --kv-bits changes nothing")
        self.profile = replace(
            profile,
            runs_batched=False,
            interleaves=family.may_interleave,
            shares_prefixes=False,
            scores_prompts=False,
            notes=(*profile.notes, *notes),
        )

    def ungroup(self) -> None:
        """Nothing was grouped."""

    def make_cache(self) -> list[Any]:
        entries = list(make_prompt_cache(self._model.language_model))
        return [OwnCache(entries)] if self._family.keeps_own_cache else entries

    def encode(self, span: MediaSpan) -> Features:
        """The tower runs with the prompt; here is nothing to keep."""
        return Features(mx.zeros((0, 1)))

    def prompt_state(self, prompt: Prompt) -> WholeState:
        return WholeState(prompt.token_ids, prompt.media[0].inputs if prompt.media else {})

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> Any:
        if state is None:  # a trace of shapes
            return self._traced(tokens.shape[1], _entries(cache))
        given = tokens[0].tolist()
        state.later += given[max(0, len(state.token_ids) - start) :]
        return _NoLogits()

    def _traced(self, length: int, entries: list[Any]) -> Any:
        try:
            return self._family.first_pass(self._model, [0] * length, {}, entries)[0]
        except Exception as error:  # code that answers about pictures only
            log.info("%s tells nothing of what a row will hold (%s)", self.profile.name, error)
            return _NoLogits()

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        (state,), (position,) = states, positions
        assert isinstance(state, WholeState)
        entries = _entries(cache)
        if state.carried is not None:
            return self._family.step(self._model, tokens, entries, state.carried)
        logits, state.carried = self._family.first_pass(self._model, state.token_ids, state.inputs, entries)
        num_prompt = len(state.token_ids)
        if position < num_prompt:
            return logits
        later = [*state.later[: position - num_prompt], int(tokens.item())]
        for token in later:  # as they were decoded before
            logits = self._family.step(self._model, mx.array([[token]]), entries, state.carried)
        return logits

    def close(self) -> None:
        self._model = None
        self.adapters.close()


def _entries(cache: list[Any]) -> list[Any]:
    return cache[0].entries if len(cache) == 1 and isinstance(cache[0], OwnCache) else cache


class WholeMedia:
    """Prompts of such a model: its processor is given text and pictures together. Thread-safe."""

    def __init__(self, family: WholeFamily) -> None:
        self._family = family
        self.placeholders = {"image": family.placeholder}

    def expand(
        self,
        text: str,
        images: Sequence[Image] = (),
        clips: Sequence[Clip] = (),
        *,
        add_special_tokens: bool | None = None,
    ) -> tuple[tuple[int, ...], tuple[MediaSpan, ...]]:
        """Token ids, and one span that stands for all pictures. InvalidRequest for more than the model takes."""
        family = self._family
        if clips:
            raise family.refuse("takes no clips and no sounds here.")
        if family.max_images is not None and len(images) > family.max_images:
            raise family.refuse(
                f"takes {family.max_images} image and no clip in a conversation; this one has {len(images)}."
            )
        if text.count(family.placeholder) != len(images):
            raise InvalidRequest(
                f"The messages hold the text {family.placeholder!r}, which {family.profile.name} keeps for images.",
                param="messages",
                code="media_mismatch",
            )
        if not images:
            return family.read_text(text).token_ids, ()
        try:
            prompt = family.read_images(text, images)
        except InvalidRequest:
            raise
        except Exception as error:  # processors of a hundred makers
            raise family.refuse(f"cannot take this image: its processor failed ({error}).") from error
        inputs = dict(prompt.inputs)
        span = MediaSpan(start=0, length=1, kind="image", content_hash=content_hash(inputs), inputs=inputs)
        return prompt.token_ids, (span,)
