"""Models that must see a whole prompt in one pass, because its tokens see each other in both directions (PaliGemma).

They are served one request at a time, without a prefix cache: `prefill` only notes its tokens, and the first decode
step computes the prompt with its pictures by mlx-vlm's own code. MLX thread; `WholeMedia` worker threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np
from mlx_vlm.models.cache import make_prompt_cache
from mlx_vlm.utils import process_inputs

from ..errors import EngineError, InvalidRequest
from .adapters import AdapterBank
from .base import Features, Prompt
from .grouped import RowWindow
from .media import content_hash
from .profile import ModelProfile
from .span import Clip, MediaSpan

if TYPE_CHECKING:
    from PIL.Image import Image

_OF_THE_TEXT = frozenset({"input_ids", "attention_mask", "token_type_ids", "labels"})


@dataclass(frozen=True, slots=True)
class WholeRule:
    """Why a model type is one of these; how many pictures it takes; the chat template of checkpoints without one."""

    reason: str
    max_images: int
    template: str


# A checkpoint that answers instructions about one picture; earlier turns are only text to it.
_INSTRUCTIONS = (
    "{% for message in messages %}{% if message.content is not string %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% for message in messages %}{{ '' if loop.first else '\n' }}{% if message.content is string %}"
    "{{ message.content }}{% else %}{% for part in message.content %}{% if part.type == 'text' %}{{ part.text }}"
    "{% endif %}{% endfor %}{% endif %}{% endfor %}"
)
RULES: Mapping[str, WholeRule] = {
    "paligemma": WholeRule("it reads its whole prompt in both directions", 1, _INSTRUCTIONS),
}


def find_rule(model: Any, model_type: str) -> WholeRule | None:
    """The rule for a loaded mlx-vlm model; None when its prompts can be cut into chunks."""
    rule = RULES.get(model_type)
    reads_ahead = getattr(model.config.text_config, "use_bidirectional_attention", True) if rule is not None else False
    return rule if reads_ahead else None


@dataclass
class WholeState:
    """Of one sequence: what its first pass needs. Mutable; MLX thread."""

    token_ids: tuple[int, ...]
    inputs: Mapping[str, np.ndarray]
    later: list[int] = field(default_factory=list)  # tokens behind the prompt, noted when a preempted row comes back
    is_computed: bool = False


class _NoLogits:
    """In place of a prompt's logits, which no pass has computed yet."""

    def __getitem__(self, index: object) -> mx.array:
        raise EngineError("This model sees its prompt as a whole and has no log-probabilities of its tokens.")


class WholePromptModel:
    """`LanguageModel` over such an mlx-vlm model."""

    atomic_spans = False
    can_group = False

    def __init__(self, model: Any, rule: WholeRule, profile: ModelProfile) -> None:
        self._model = model
        self.adapters = AdapterBank(model.language_model, RowWindow())
        note = f"{profile.model_type} runs one request at a time and without prefix cache: {rule.reason}"
        self.profile = replace(profile, runs_batched=False, shares_prefixes=False, notes=(*profile.notes, note))

    def ungroup(self) -> None:
        """Nothing was grouped."""

    def make_cache(self) -> list[Any]:
        return list(make_prompt_cache(self._model.language_model))

    def encode(self, span: MediaSpan) -> Features:
        """The tower runs with the prompt; here is nothing to keep."""
        return Features(mx.zeros((0, 1)))

    def prompt_state(self, prompt: Prompt) -> WholeState:
        return WholeState(prompt.token_ids, prompt.media[0].inputs if prompt.media else {})

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> Any:
        if state is None:  # a trace of shapes
            return self._model.language_model(tokens, cache=cache).logits
        given = tokens[0].tolist()
        state.later += given[max(0, len(state.token_ids) - start) :]
        return _NoLogits()

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        (state,), (position,) = states, positions
        if state is None or state.is_computed:
            return self._step(tokens, cache)
        state.is_computed = True
        logits = self._first_pass(state, cache)
        num_prompt = len(state.token_ids)
        if position < num_prompt:
            return logits
        later = [*state.later[: position - num_prompt], int(tokens.item())]
        for token in later:  # as they were decoded before
            logits = self._step(mx.array([[token]]), cache)
        return logits

    def _first_pass(self, state: WholeState, cache: list[Any]) -> mx.array:
        tokens = mx.array([state.token_ids])
        pixels = state.inputs.get("pixel_values")
        rest = {k: mx.array(v) for k, v in state.inputs.items() if k != "pixel_values"}
        found = self._model.get_input_embeddings(
            tokens, None if pixels is None else mx.array(pixels), mask=mx.ones_like(tokens), **rest
        )
        extra = {k: v for k, v in found.to_dict().items() if k != "inputs_embeds" and v is not None}
        out = self._model.language_model(tokens, inputs_embeds=found.inputs_embeds, cache=cache, **rest, **extra)
        logits: mx.array = out.logits[:, -1, :]
        return logits

    def _step(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        logits: mx.array = self._model.language_model(tokens, cache=cache).logits[:, -1, :]
        return logits

    def close(self) -> None:
        self._model = None


class WholeMedia:
    """Prompts of such a model: its processor is given text and pictures together. Thread-safe."""

    def __init__(self, rule: WholeRule, processor: Any, tokenizer: Any, profile: ModelProfile) -> None:
        self._rule = rule
        self._processor = processor
        self._tokenizer = tokenizer
        self._name = profile.name
        self.placeholders = {"image": str(getattr(processor, "image_token", "<image>"))}

    def expand(
        self,
        text: str,
        images: Sequence[Image] = (),
        clips: Sequence[Clip] = (),
        *,
        add_special_tokens: bool | None = None,
    ) -> tuple[tuple[int, ...], tuple[MediaSpan, ...]]:
        """Token ids, and one span that stands for all pictures. InvalidRequest for more than the model takes."""
        if len(images) > self._rule.max_images or clips:
            raise InvalidRequest(
                f"{self._name} takes {self._rule.max_images} image and no clip in a conversation; "
                f"this one has {len(images)}.",
                param="messages",
                code="unsupported_media",
            )
        if text.count(self.placeholders["image"]) != len(images):
            raise InvalidRequest(
                f"The messages hold the text {self.placeholders['image']!r}, which {self._name} keeps for images.",
                param="messages",
                code="media_mismatch",
            )
        if not images:
            bos = getattr(self._tokenizer, "bos_token", None) or ""
            return tuple(self._tokenizer.encode(f"{bos}{text}\n", add_special_tokens=False)), ()
        out = process_inputs(self._processor, prompts=[text], images=list(images), add_special_tokens=False)
        token_ids = tuple(np.asarray(out["input_ids"]).reshape(-1).tolist())
        inputs = {k: np.asarray(v) for k, v in out.items() if k not in _OF_THE_TEXT and v is not None}
        span = MediaSpan(start=0, length=1, kind="image", content_hash=content_hash(inputs), inputs=inputs)
        return token_ids, (span,)
