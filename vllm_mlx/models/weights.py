"""The dtype weights are kept in: as stored, or made fit for a CPU whose 16-bit and 4-bit kernels are scalar code.

MLX thread only. Works on a lazily loaded model and evaluates it piece by piece, so that the stored and the converted
form of the whole never stand in memory together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import ModelLoadError
from . import huge_pages

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# float32 weights may take this share of what is available; the rest is for keys, values and everything else.
_FLOAT32_SHARE = 0.5
_EVAL_BYTES = 512 << 20


@dataclass(frozen=True)
class Precision:
    """What to do to weights. `dtype` None keeps each array's own."""

    dtype: str | None = None
    dequantize: bool = False
    note: str | None = None


def choose_precision(
    dtype: str,
    *,
    is_cpu: bool,
    num_parameters: int,
    is_quantized: bool,
    stored_dtype: str,
    available_bytes: int,
    unpack_limit_bytes: int | None = None,
) -> Precision:
    """`--dtype` resolved for this machine. 'keep' changes nothing, 'auto' nothing but on the CPU."""
    if dtype == "keep":
        return Precision()
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ModelLoadError(f"--dtype {dtype} is unknown; choose auto, keep, {', '.join(sorted(DTYPES))}.")
        return Precision(dtype=dtype)
    if not is_cpu or (stored_dtype == "float32" and not is_quantized):
        return Precision()
    limit_bytes = available_bytes * _FLOAT32_SHARE
    if num_parameters * 4 <= (limit_bytes if unpack_limit_bytes is None else min(limit_bytes, unpack_limit_bytes)):
        return Precision(
            dtype="float32",
            dequantize=is_quantized,
            note="weights were converted to float32, which the CPU computes fastest (--dtype)",
        )
    if is_quantized:
        return Precision(
            dtype="float32",
            note="weights stay quantised with float32 scales: unpacked they would not fit in memory",
        )
    return Precision(note=f"weights stay {stored_dtype}: in float32 they would not fit in memory")


def apply_precision(model: nn.Module, precision: Precision) -> None:
    """Convert in place and evaluate every parameter."""
    if precision.dtype is not None:
        # First the scales, then the unpacking, so that dequantised weights are not rounded twice.
        model.set_dtype(DTYPES[precision.dtype])
    if precision.dequantize:
        dequantize(model, DTYPES[precision.dtype or "float32"])
    pending: list[mx.array] = []
    pending_bytes = 0
    for _, array in tree_flatten(model.parameters()):
        pending.append(array)
        pending_bytes += array.nbytes
        if pending_bytes >= _EVAL_BYTES:
            mx.eval(pending)
            pending, pending_bytes = [], 0
    mx.eval(pending)
    huge_pages.merge(array for _, array in tree_flatten(model.parameters()))


def dequantize(model: nn.Module, dtype: mx.Dtype) -> None:
    """Replace quantised layers by plain ones. A layer of an unknown kind stays as it is: slower, never wrong."""
    replaced: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        make = _plain_layer(module)
        if make is None:
            continue
        weight = mx.dequantize(
            module["weight"],
            module["scales"],
            module.get("biases"),
            group_size=module.group_size,
            bits=module.bits,
            mode=getattr(module, "mode", "affine"),
        ).astype(dtype)
        plain = make(weight)
        plain.weight = weight
        if "bias" in module:
            plain.bias = module["bias"]
        replaced.append((name, plain))
    if replaced:
        model.update_modules(tree_unflatten(replaced))


def _plain_layer(module: nn.Module) -> Callable[[mx.array], Any] | None:
    """A maker of the unquantised twin of a layer, given the unpacked weight."""
    has_bias = "bias" in module
    if "global_scale" in module:
        return None
    if isinstance(module, nn.QuantizedLinear):
        # Made tiny and then given its weight: nn.Linear would draw random numbers for the full shape.
        return lambda weight: nn.Linear(1, 1, bias=has_bias)
    if isinstance(module, nn.QuantizedEmbedding):
        return lambda weight: nn.Embedding(1, 1)
    name = type(module).__name__
    if name in ("QuantizedSwitchLinear", "QuantizedMultiLinear"):
        # The twin lives beside the class, in whichever of the two stacks the model is from.
        plain = getattr(sys.modules[type(module).__module__], name.removeprefix("Quantized"))
        options = {"bias": has_bias} if name == "QuantizedSwitchLinear" else {}
        return lambda weight: plain(1, 1, 1, **options)
    return None
