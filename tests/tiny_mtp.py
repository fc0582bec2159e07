"""Gives a tiny model a head for the token after next, written as its family's checkpoints write one.

`random` heads say anything. A `perfect` one belongs to a model whose next token depends on its last one alone: every
layer adds nothing, and the head passes the next token's embedding on, so that it says what the model will say.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from tests import tiny_models
from vllm_mlx.models.json_file import read_json
from vllm_mlx.models.mtp import NAMINGS

FAMILIES = tuple(NAMINGS)
ADDING = ("o_proj", "down_proj")


def build(family: str, folder: Path, *, is_perfect: bool = False) -> Path:
    """A model of the family with a head, in `folder`."""
    out = tiny_models.build(family, folder)
    args = importlib.import_module(f"mlx_lm.models.{family}").ModelArgs.from_dict(read_json(out / "config.json"))
    weights = dict(mx.load(str(out / "model.safetensors")))
    naming = NAMINGS[family]
    prefix = naming.prefix.format(n=args.num_hidden_layers)
    head = _block(family, args)
    dim = args.hidden_size
    mx.random.seed(5)
    head |= {
        f"{naming.project}.weight": mx.random.normal((dim, 2 * dim)) / dim**0.5,
        **{f"{name}.weight": mx.ones(dim) for name in (naming.token_norm, naming.state_norm, naming.out_norm)},
    }
    if is_perfect:
        weights = {name: _silenced(name, array) for name, array in weights.items()}
        weights["model.embed_tokens.weight"] = mx.random.normal((tiny_models.VOCAB, dim))
        head = {name: _silenced(name, array) for name, array in head.items()}
        halves = [mx.eye(dim), mx.zeros((dim, dim))]  # the embedding, and not the state
        head[f"{naming.project}.weight"] = mx.concatenate(halves[::-1] if naming.state_first else halves, axis=1)
    mx.eval(weights, head)
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    written = {prefix + name: array for name, array in head.items()}
    if family == "glm4_moe":  # its checkpoints hold each expert by itself, and copies of the model's own matrices
        written |= {f"{prefix}shared_head.head.weight": mx.zeros((tiny_models.VOCAB, dim)),
                    f"{prefix}embed_tokens.weight": mx.zeros((tiny_models.VOCAB, dim))}  # fmt: skip
    mx.save_safetensors(str(out / "model-mtp.safetensors"), written, {"format": "mlx"})
    return out


def _block(family: str, args: object) -> dict[str, mx.array]:
    """A layer's weights by the names of the checkpoint."""
    module = importlib.import_module(f"mlx_lm.models.{family}")
    block: nn.Module = module.TransformerBlock(args) if family == "mimo" else module.DecoderLayer(args, 99)
    mx.random.seed(6)
    tiny_models.randomize(block)
    found: dict[str, mx.array] = {}
    for name, array in tree_flatten(block.parameters()):
        if ".switch_mlp." in name:
            for i, expert in enumerate(array):
                found[name.replace(".switch_mlp.", f".experts.{i}.")] = expert
        else:
            found[name] = array
    return found


def _silenced(name: str, array: mx.array) -> mx.array:
    return mx.zeros_like(array) if any(part in name for part in ADDING) else array
