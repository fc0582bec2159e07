"""How a byte budget is divided among models: weights, and what each may take for keys and values. Plain arithmetic.

What the budget leaves beside the weights of all models is divided evenly. Where the weights do not fit together, a
model is given an even part of what its own weights alone would leave, and models take turns. Models beside the chat
keep no keys and values; they take their weights and room to compute in.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

KV_SHARE = 0.8
"""Of what a model may have beside its weights; the rest is for activations and media."""
MIN_KV_BYTES = 64 << 20
"""What an engine needs at least."""
FLOAT32_BYTES = 4


class Weighed(Protocol):
    """The facts of a model that this needs; `models.profile.ModelProfile` fits."""

    @property
    def weights_bytes(self) -> int: ...

    @property
    def num_parameters(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Share:
    """`weights_bytes` in memory, which on a CPU may be float32; `kv_bytes` for rows and prefix cache."""

    weights_bytes: int
    kv_bytes: int

    @property
    def cost_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes


WORK_BYTES = 32 << 20
"""What a slice of a job beside the chat may take while it is computed."""


def divide(budget_bytes: int, models: Sequence[Weighed], *, is_cpu: bool, beside_bytes: int = 0) -> list[Share]:
    """One share a model, in order. A model that cannot fit gets a share that says what it would need. `beside_bytes`
    are what all models beside the chat take together."""
    even = budget_bytes // len(models)
    weights = [_in_memory(model, even, is_cpu=is_cpu) for model in models]
    together = (budget_bytes - beside_bytes - sum(weights)) // len(models)
    shares = []
    for own in weights:
        room = together if together * KV_SHARE >= MIN_KV_BYTES else (budget_bytes - own) // len(models)
        shares.append(Share(own, max(MIN_KV_BYTES, int(room * KV_SHARE))))
    return shares


def _in_memory(model: Weighed, even_bytes: int, *, is_cpu: bool) -> int:
    """On a CPU, weights become float32 where that leaves half of an even part of the budget."""
    unpacked = model.num_parameters * FLOAT32_BYTES
    return unpacked if is_cpu and unpacked <= even_bytes / 2 else model.weights_bytes
