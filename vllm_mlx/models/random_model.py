"""Writes random weights for a model folder that has a config.json: for benchmarks, which download nothing.

Matrices keep activations near one, norms are ones. `silent` token ids get zero logits, so that they are never the most
likely: output neither ends early nor holds half a character.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten


def write_weights(folder: Path, silent: Sequence[int] = ()) -> int:
    """Make `model.safetensors` for the folder's config; returns the number of parameters."""
    config = json.loads((folder / "config.json").read_text())
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(config))
    weights = {}
    for name, array in tree_flatten(model.parameters()):
        if array.ndim > 1 and mx.issubdtype(array.dtype, mx.floating):
            is_embedding = "embed_tokens" in name
            fan_in = math.prod(array.shape[1:]) if "conv" in name else array.shape[-1]
            gain = 2.0 if is_embedding or "down_proj" in name or "lm_head" in name else 1.0
            array = mx.random.normal(array.shape) * (gain / math.sqrt(fan_in))
            if silent and (is_embedding or "lm_head" in name):
                keep = mx.ones((array.shape[0], 1))
                keep[mx.array(list(silent))] = 0
                array = array * keep
        weights[name] = array
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return sum(array.size for array in weights.values())
