"""Heads for the token after next (multi-token prediction) that a checkpoint brings and mlx-lm leaves out. MLX thread.

A head is one more layer of the model's own kind: from the state behind a token and the embedding of the next token it
makes a state whose logits are for the token after that (Gloeckle et al. 2024; as in DeepSeek-V3, 2024). Embedding and
output matrix are the model's. What a head says is a guess (`engine/mtp_draft.py`), so no text depends on it.

Here are the families whose mlx-lm model is an inner model and an output matrix, with plain attention. In others
(Qwen3-Next, Qwen3.5, Nemotron-H) recurrent layers cannot take back a wrong guess, so a head would be of no use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.cache import KVCache

from .base import Features
from .checkpoint import read_checkpoint
from .profile import ModelProfile
from .text import TextModel


@dataclass(frozen=True, slots=True)
class Naming:
    """How a family writes a head. `prefix`: {n} is the number of the model's own layers.

    `state_first`: in the pair that is projected, the state stands before the embedding. `feeds_normed`: a head that
    goes on from its own state goes on from the normed one.
    """

    prefix: str
    token_norm: str
    state_norm: str
    project: str
    out_norm: str
    state_first: bool
    feeds_normed: bool


NAMINGS: Mapping[str, Naming] = {
    "mimo": Naming("model.mtp_layers.0.", "token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm",
                   state_first=True, feeds_normed=True),
    "glm4_moe": Naming("model.layers.{n}.", "enorm", "hnorm", "eh_proj", "shared_head.norm", state_first=False,
                       feeds_normed=False),
}  # fmt: skip
# Copies of the model's own matrices.
_SHARED = ("embed_tokens.", "shared_head.head.")


class MtpHead(nn.Module):
    """One head. `block` is a layer of the model's own class."""

    def __init__(self, block: nn.Module, naming: Naming, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.token_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.state_norm = nn.RMSNorm(hidden_size, eps=eps)
        self.project = nn.Linear(2 * hidden_size, hidden_size, bias=False)
        self.block = block
        self.out_norm = nn.RMSNorm(hidden_size, eps=eps)
        self._naming = naming

    def __call__(self, states: mx.array, embeddings: mx.array, cache: Any) -> tuple[mx.array, mx.array]:
        """(what goes into the output matrix, what another step of this head goes on from), both [1, n, D], for pairs of
        a token's state and the next token's embedding, [1, n, D] each. `cache` is the head's own, for one layer."""
        parts = [self.token_norm(embeddings), self.state_norm(states)]
        h = self.project(mx.concatenate(parts[::-1] if self._naming.state_first else parts, axis=-1))
        h = self.block(h, create_attention_mask(h, cache), cache)
        out = self.out_norm(h)
        return out, out if self._naming.feeds_normed else h


class MtpTextModel(TextModel):
    """A text model with its head. `states` are the last call's, [R, L, D], behind the final norm; unevaluated."""

    def __init__(self, model: Any, profile: ModelProfile, head: MtpHead) -> None:
        super().__init__(model, profile)
        self.head = head
        self.states: mx.array | None = None

    def prefill(
        self, tokens: mx.array, start: int, cache: list[Any], state: Any | None, features: Mapping[int, Features]
    ) -> mx.array:
        self.states = self._model.model(tokens, cache)
        return self.logits(self.states)

    def decode(
        self, tokens: mx.array, positions: Sequence[int], cache: list[Any], states: Sequence[Any | None]
    ) -> mx.array:
        self.states = self._model.model(tokens, cache)
        return self.logits(self.states)[:, -1, :]

    def embed(self, tokens: mx.array) -> mx.array:
        return mx.array(self._model.model.embed_tokens(tokens))

    def logits(self, states: mx.array) -> mx.array:
        """As the model's own class makes them of its inner model's output."""
        if self._model.args.tie_word_embeddings and "lm_head" not in self._model:
            return mx.array(self._model.model.embed_tokens.as_linear(states))
        return mx.array(self._model.lm_head(states))

    def make_head_cache(self) -> list[Any]:
        return [KVCache()]

    def close(self) -> None:
        super().close()
        self.states = None


def read_head(model: Any, profile: ModelProfile) -> MtpHead | None:
    """The head that the folder of `model` holds, lazily loaded; None where there is none, or of an unknown kind."""
    naming = NAMINGS.get(profile.model_type)
    if naming is None:
        return None
    num_layers = len(model.layers)
    prefix = naming.prefix.format(n=num_layers)
    found: dict[str, mx.array] = {}
    for file in read_checkpoint(profile.path, quantization=profile.quantization or {}).files:
        for name, array in mx.load(str(file)).items():
            if name.startswith(prefix) and not name.removeprefix(prefix).startswith(_SHARED):
                found[name.removeprefix(prefix)] = array
    if not found:
        return None
    args = model.args
    kind = type(model.layers[-1])
    block = kind(args, num_layers) if profile.model_type == "glm4_moe" else kind(args)
    head = MtpHead(block, naming, args.hidden_size, args.rms_norm_eps)
    weights = _renamed(found, naming)
    if (quantization := profile.quantization) is not None:
        nn.quantize(
            head, quantization.get("group_size", 64), quantization.get("bits", 4),
            class_predicate=lambda path, module: f"{path}.scales" in weights,
        )  # fmt: skip
    try:
        head.load_weights(list(weights.items()))
    except ValueError:  # another layout than this family's files had: guessing is not worth a failed start
        return None
    head.eval()
    return head


def _renamed(found: Mapping[str, mx.array], naming: Naming) -> dict[str, mx.array]:
    names = {naming.token_norm: "token_norm", naming.state_norm: "state_norm", naming.project: "project",
             naming.out_norm: "out_norm"}  # fmt: skip
    weights: dict[str, mx.array] = {}
    experts: dict[str, dict[int, mx.array]] = {}
    for name, array in found.items():
        module, _, leaf = name.rpartition(".")
        if module in names:
            weights[f"{names[module]}.{leaf}"] = array
        elif match := re.fullmatch(r"mlp\.experts\.(\d+)\.(.+)", name):
            experts.setdefault(match[2], {})[int(match[1])] = array
        elif "rotary_emb" not in name:
            weights[f"block.{name}"] = array
    for rest, arrays in experts.items():
        weights[f"block.mlp.switch_mlp.{rest}"] = mx.stack([arrays[i] for i in sorted(arrays)])
    return weights
