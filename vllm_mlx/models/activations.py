"""What computing a prompt chunk takes beside weights and KV, estimated from a model's config. No MLX; reads one file.

The estimate is of the widest moment of a layer: the residual stream and its copies, the MLP's three wide arrays, and
the attention scores of every chunk token with every token before it, which MLX's CPU backend, quantised KV and MLA hold
as an array. It is meant to be too high rather than too low.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .json_file import read_json

_STREAM_COPIES = 8
_MLP_COPIES = 3
# The scores, and the exponentials they become.
_SCORE_COPIES = 2


@dataclass(frozen=True, slots=True)
class ActivationCost:
    """Bytes for each token of a chunk, and for each pair of a chunk token with a token it attends to."""

    per_token: int
    per_pair: int

    def tokens_within(self, budget_bytes: int, context: int) -> int:
        """The largest chunk at this depth whose activations fit the budget; at least one token."""
        if self.per_token + self.per_pair <= 0:
            return 1 << 30
        # A chunk of n attends to context + n: n * (token + pair * (context + n)) <= budget.
        linear, square = self.per_token + self.per_pair * context, self.per_pair
        if not square:
            return max(1, budget_bytes // linear)
        return max(1, int(((linear * linear + 4 * square * budget_bytes) ** 0.5 - linear) / (2 * square)))


def read_activation_cost(path: Path, *, value_bytes: int) -> ActivationCost:
    """Estimate for the model in folder `path`, whose activations have `value_bytes` a number."""
    config = read_json(path / "config.json")
    text = config.get("text_config")
    config = {**config, **text} if isinstance(text, dict) else config

    def number(*names: str) -> int:
        return max((int(config[name]) for name in names if isinstance(config.get(name), int)), default=0)

    hidden = number("hidden_size", "d_model", "n_embd")
    experts = max(1, number("num_experts_per_tok", "moe_top_k"))
    wide = max(number("intermediate_size", "d_inner"), experts * number("moe_intermediate_size"), 4 * hidden)
    heads = number("num_attention_heads", "n_head", "num_heads")
    per_token = value_bytes * (_STREAM_COPIES * hidden + _MLP_COPIES * wide)
    return ActivationCost(per_token, _SCORE_COPIES * value_bytes * heads)
