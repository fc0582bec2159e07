"""LoRA adapters as files: mlx-lm's folders and PEFT's, read into one form. MLX thread only.

    mlx-lm   adapter_config.json (lora_parameters.scale), adapters.safetensors:
             PATH.lora_a [in, r], PATH.lora_b [r, out]
    PEFT     adapter_config.json (r, lora_alpha), adapter_model.safetensors:
             PATH.lora_A.weight [r, in], PATH.lora_B.weight [out, r]

LoRA: Hu et al. (2021), y = W x + scale * B A x. What is more than that (DoRA, trained embeddings) is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import ModelLoadError
from .json_file import read_json

WEIGHT_FILES = ("adapters.safetensors", "adapter_model.safetensors")


@dataclass(frozen=True)
class LowRank:
    """One layer's part: `a` [in, r] and `b` [r, out], the scale within `b`."""

    a: mx.array
    b: mx.array


def read_adapter(folder: Path) -> dict[str, LowRank]:
    """An adapter's layers by module path from `layers.` on. Raises ModelLoadError, one sentence."""
    if not folder.is_dir():
        raise ModelLoadError(f"The adapter {folder} is not a folder.")
    weights = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    config_file = folder / "adapter_config.json"
    if weights is None or not config_file.is_file():
        raise ModelLoadError(
            f"The adapter {folder} lacks adapter_config.json or its weights ({' or '.join(WEIGHT_FILES)})."
        )
    config = read_json(config_file)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora" or config.get("use_dora"):
        raise ModelLoadError(f"The adapter {folder} is not plain LoRA but {kind if kind != 'lora' else 'DoRA'}.")
    try:
        arrays: Mapping[str, mx.array] = mx.load(str(weights))
    except (RuntimeError, ValueError) as error:
        raise ModelLoadError(f"The adapter's weights {weights} cannot be read: {error}") from error
    return _pair(arrays, config, folder)


def _pair(arrays: Mapping[str, mx.array], config: Mapping[str, Any], folder: Path) -> dict[str, LowRank]:
    halves: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        path, half, array = _name(name, array)
        if half is None:
            raise ModelLoadError(f"The adapter {folder} changes {name}, which is not a low-rank layer.")
        halves.setdefault(path, {})[half] = array
    layers = {}
    for path, pair in halves.items():
        a, b = pair.get("a"), pair.get("b")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
            raise ModelLoadError(f"The adapter {folder} has no pair of fitting matrices for {path}.")
        layers[path] = LowRank(a, b * _scale(config, a.shape[1]))
    if not layers:
        raise ModelLoadError(f"The adapter {folder} holds no layers.")
    return layers


def _name(name: str, array: mx.array) -> tuple[str, str | None, mx.array]:
    """Module path, which half of the pair it is (None: neither), and the matrix in mlx-lm's orientation."""
    at = name.find("layers.")
    path = name[at:] if at >= 0 else name
    for ending, half, is_turned in (
        (".lora_a", "a", False),
        (".lora_b", "b", False),
        (".lora_A.weight", "a", True),
        (".lora_B.weight", "b", True),
    ):
        if path.endswith(ending):
            return path.removesuffix(ending), half, array.T if is_turned else array
    return path, None, array


def _scale(config: Mapping[str, Any], rank: int) -> float:
    parameters = config.get("lora_parameters")
    if isinstance(parameters, dict):
        return float(parameters.get("scale", 20.0))  # mlx-lm's own default
    alpha = float(config.get("lora_alpha", rank))
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
