"""This process's part of a model that several compute together: mlx-lm's own sharding. MLX thread only.

Tensor: every rank has a part of each layer's heads and neurons, and the parts are added up in each layer. Pipeline:
every rank has some of the layers. Weights are loaded lazily before, so a rank reads its part of the files only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..errors import ModelLoadError
from .profile import ModelProfile

HEADS = ("num_attention_heads", "num_key_value_heads")


def place() -> tuple[int, int]:
    """This process's rank, and how many there are; (0, 1) without a launcher. Waits for all."""
    group = mx.distributed.init()
    return group.rank(), group.size()


def shared(note: bytes) -> bytes:
    """Rank 0's `note`, to all; the others give zeros of the same length, so the sum is rank 0's."""
    return bytes(mx.distributed.all_sum(mx.array(list(note), dtype=mx.int32)).tolist())


def least(value: int) -> int:
    """The smallest of all ranks' values; all must call it."""
    return int(mx.distributed.all_gather(mx.array([value], dtype=mx.int32)).min().item())


def splitter(kind: str, profile: ModelProfile, config: dict[str, Any], group: Any = None) -> Callable[[Any], None]:
    """What takes this rank's part of a lazily loaded model; `kind` is tensor or pipeline. `group`: else all processes.

    Raises ModelLoadError, here or when called, for a model that cannot be split so.
    """
    group = group or mx.distributed.init()
    size = group.size()
    if kind == "tensor":
        for name in HEADS:
            count = config.get(name)
            if isinstance(count, int) and count % size:
                raise ModelLoadError(
                    f"{profile.name} has {name} {count}, which {size} processes cannot share evenly; "
                    "start another number of them."
                )

    def split(model: Any) -> None:
        if kind == "tensor":
            if not hasattr(model, "shard"):
                raise ModelLoadError(f"{profile.model_type} models have no tensor split; try --distributed pipeline.")
            model.shard(group)
            return
        inner = getattr(model, "model", None)
        if inner is None or not hasattr(inner, "pipeline"):
            raise ModelLoadError(f"{profile.model_type} models have no pipeline split; try --distributed tensor.")
        inner.pipeline(group)

    return split
