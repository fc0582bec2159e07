"""Decoder layers in few launches, on CUDA. MLX thread only.

Decoding on a GPU, and short prompts too, are bound by the host, which launches some 25 operations a layer and builds
each of them in Python. In the layers known here (`joint.py`'s families, with a SwiGLU) everything but cache and
attention becomes two compiled functions, whose products of the same input are one product each:

    heads        queries, keys and values, normed and turned         1 product, 1 kernel
    (cache, attention)
    rest         output, sum, norm, gate and up, SwiGLU, down, sum,  3 products, 3 kernels
                 the next layer's norm

The weights are the functions' arguments: all layers share them, and each is traced once for a number of tokens. As long
as adapters are loaded, layers are computed the plain way.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.rope_utils import Llama3RoPE

from . import cuda_kernels
from .grouped import Around, RowWindow

log = logging.getLogger(__name__)

Arrays = tuple[mx.array, ...]

# Families of `joint.py` whose layers add attention's and the MLP's answers to what they are given, each after a norm.
FAMILIES = "llama mimo qwen2 qwen3 seed_oss".split()


# ── products of one input ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Product:
    """What a linear layer computes, without its arrays."""

    has_bias: bool
    bits: int = 0
    group_size: int = 0
    mode: str = ""
    has_zeros: bool = False

    def of(self, x: mx.array, arrays: Arrays) -> mx.array:
        """`x` [..., in] -> [..., out]."""
        weight, *rest = arrays
        bias = rest.pop() if self.has_bias else None
        if not self.bits:
            return x @ weight.T if bias is None else mx.addmm(bias, x, weight.T)
        zeros = rest[1] if self.has_zeros else None
        y = mx.quantized_matmul(
            x, weight, rest[0], zeros, transpose=True, group_size=self.group_size, bits=self.bits, mode=self.mode
        )
        return y if bias is None else y + bias


_PARTS = ("weight", "scales", "biases", "bias")


def as_product(linears: Sequence[nn.Module]) -> tuple[Product, Arrays] | None:
    """One product that computes what all these do, one after the other; None where they are not alike.

    The layers keep working: their arrays become parts of the product's, so that nothing is held twice.
    """
    products = {_product_of(linear) for linear in linears}
    product = products.pop()
    if products or product is None:
        return None
    names = [name for name in _PARTS if name in linears[0]]
    arrays = tuple(linears[0][name] for name in names)
    if len(linears) > 1:
        arrays = tuple(mx.concatenate([linear[name] for linear in linears], axis=0) for name in names)
        mx.eval(arrays)
        start = 0
        for linear in linears:
            end = start + linear["weight"].shape[0]
            for name, whole in zip(names, arrays, strict=True):
                linear[name] = whole[start:end]
            mx.eval([linear[name] for name in names])
            start = end
    return product, arrays


def _product_of(linear: nn.Module) -> Product | None:
    if type(linear) is nn.Linear:
        return Product("bias" in linear)
    if type(linear) is nn.QuantizedLinear:
        return Product("bias" in linear, linear.bits, linear.group_size, linear.mode, "biases" in linear)
    return None


def _have_one_type(linears: Sequence[nn.Module], norms: Sequence[nn.Module]) -> bool:
    """Whether all numbers are of one type, as the kernels take them: some checkpoints keep their norms in float32."""
    arrays = [linear[name] for linear in linears for name in _PARTS if name in linear]
    types = {array.dtype for array in (*arrays, *(norm.weight for norm in norms))}
    return len([dtype for dtype in types if mx.issubdtype(dtype, mx.floating)]) == 1


# ── queries, keys and values ────────────────────────────────────────────────────────────────────────────────────────


class FusedHeads:
    """The projections of an attention layer, with its norms and its rotary positions, of input of type `dtype`."""

    def __init__(self, call: Callable[..., Any], arrays: Arrays, constants: Arrays, dtype: mx.Dtype) -> None:
        self.dtype = dtype
        self._call = call
        self._arrays = arrays
        self._constants = constants

    @classmethod
    def of(cls, inner: nn.Module, *, has_norms: bool) -> FusedHeads | None:
        """None where it is not known how, or the device has no kernels."""
        if not cuda_kernels.are_available():
            return None
        dim = inner.q_proj.weight.shape[0] // inner.n_heads
        frequencies = _frequencies(inner.rope, dim)
        if dim not in cuda_kernels.HEAD_DIMS or frequencies is None:
            return None
        linears = [inner.q_proj, inner.k_proj, inner.v_proj]
        one_type = _have_one_type(linears, [inner.q_norm, inner.k_norm] if has_norms else [])
        found = as_product(linears) if one_type else None
        if found is None:
            return None
        product, arrays = found
        eps, norms = (inner.q_norm.eps, (inner.q_norm.weight, inner.k_norm.weight)) if has_norms else (0.0, ())
        mx.eval(frequencies)
        call = _heads(product, inner.n_heads, inner.n_kv_heads, eps)
        return cls(call, arrays, (frequencies, *norms), arrays[1 if product.bits else 0].dtype)

    def __call__(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """`x` [T, 1, W] at int32 [T] -> queries [T, H, 1, D], keys and values [T, K, 1, D]."""
        queries, keys, values = self._call(x, positions, self._arrays, self._constants)
        return queries, keys, values


@cache
def _heads(product: Product, num_heads: int, num_kv_heads: int, eps: float) -> Callable[..., Any]:
    def call(x: mx.array, positions: mx.array, arrays: Arrays, constants: Arrays) -> tuple[mx.array, ...]:
        frequencies, *norms = constants
        both = (norms[0], norms[1]) if norms else None
        heads = product.of(x, arrays)
        return cuda_kernels.turned_heads(heads, num_heads, num_kv_heads, both, eps, positions, frequencies)

    return mx.compile(call)


def _frequencies(rope: nn.Module, dim: int) -> mx.array | None:
    """float32 [dim / 2]: by how much each pair of numbers is turned a position; None for ways not known here."""
    if getattr(rope, "traditional", True) or rope.dims != dim:
        return None
    if type(rope) is nn.RoPE:
        exponents = np.arange(0, dim, 2, dtype=np.float64) / dim
        return mx.array((rope.scale * float(rope.base) ** -exponents).astype(np.float32))
    if type(rope) is Llama3RoPE:
        return 1.0 / rope._freqs.astype(mx.float32)
    return None


# ── the rest of a layer ─────────────────────────────────────────────────────────────────────────────────────────────


class Handed:
    """What a layer hands on beside its output `of`: that as tokens [T, 1, W], and these after the next one's norm."""

    def __init__(self) -> None:
        self.of: mx.array | None = None
        self.tokens: mx.array | None = None
        self.normed: mx.array | None = None


class FusedLayer(Around):
    """A decoder layer. `following` is the next one, whose norm is computed along."""

    def __init__(self, inner: nn.Module, following: nn.Module | None, handed: Handed, call: Callable[..., Any],
                 arrays: tuple[Arrays, ...], window: RowWindow) -> None:
        super().__init__(inner)
        self._handed = handed
        self._call = call
        self._window = window
        norms = tuple(norm.weight for norm in _norms(inner, following))
        # Behind a function, because a module takes arrays in tuples for parameters of its own.
        self._given = lambda: (arrays, norms)

    def __call__(self, x: mx.array, mask: Any = None, cache: Any = None) -> mx.array:
        layer, handed = self.inner, self._handed
        is_step = x.shape[1] == 1 and layer.self_attn.is_joint_call(x, mask, cache)
        is_plain = self._window.is_adapted or x.dtype != layer.self_attn.heads.dtype
        if is_plain or not (is_step or _is_prompt(x, cache)):
            out: mx.array = layer(x, mask, cache)
            return out
        if handed.of is x and handed.tokens is not None:
            tokens, normed = handed.tokens, handed.normed
        else:
            tokens = x if is_step else x.swapaxes(0, 1)
            normed = layer.input_layernorm(tokens)
        attended = layer.self_attn.attend(normed, mask, cache)
        arrays, norms = self._given()
        handed.tokens, handed.normed = self._call(attended, tokens, arrays, norms)
        handed.of = handed.tokens if is_step else handed.tokens.swapaxes(0, 1)
        return handed.of

    def compile_kernels(self) -> None:
        """Have all kernels of a step compiled, which takes seconds on a new machine, before anybody waits for them."""
        attention = self.inner.self_attn
        weight = self.inner.input_layernorm.weight
        x = mx.zeros((1, 1, weight.shape[0]), weight.dtype)
        one = mx.array([1], dtype=mx.int32)
        queries, keys, _ = attention.heads(x, one)
        room = mx.broadcast_to(keys, (*keys.shape[:2], cuda_kernels.SPLIT_TOKENS + 1, keys.shape[3]))
        if cuda_kernels.can_attend(queries, keys, keys):
            for longest in (1, room.shape[2]):  # alone, and split
                queries = cuda_kernels.ragged_attention(queries, room, room, one, longest, attention.inner.scale)
        arrays, norms = self._given()
        # MLX compiles its own on the first use too: what writes rows of different lengths, for one, takes five seconds.
        written = mx.put_along_axis(mx.zeros_like(room), mx.broadcast_to(one, keys.shape), keys, axis=2)
        mx.eval(self._call(queries.reshape(1, 1, -1), x, arrays, norms), written)


def _norms(layer: nn.Module, following: nn.Module | None) -> list[nn.Module]:
    """The norms that the rest of a layer computes: its own second, and the next layer's first, if there is one."""
    return [layer.post_attention_layernorm, *([following.input_layernorm] if following is not None else [])]


def _is_prompt(x: mx.array, cache: Any) -> bool:
    """Several tokens of one row, with a cache of its own."""
    return x.shape[0] == 1 and x.shape[1] > 1 and type(getattr(cache, "offset", None)) is int


@cache
def _rest(output: Product, gate_and_up: Product, down: Product, eps: tuple[float, ...]) -> Callable[..., Any]:
    def call(attended: mx.array, x: mx.array, arrays: tuple[Arrays, ...], norms: Arrays) -> tuple[mx.array, mx.array]:
        h, normed = cuda_kernels.add_norm(x, output.of(attended, arrays[0]), norms[0], eps[0])
        inside = cuda_kernels.swiglu_halves(gate_and_up.of(normed, arrays[1]))
        answer = down.of(inside, arrays[2])
        if len(norms) == 1:  # the last layer: what follows it norms for itself
            out = h + answer
            return out, out
        return cuda_kernels.add_norm(h, answer, norms[1], eps[1])

    return mx.compile(call)


def fuse_layers(model: Any, window: RowWindow) -> None:
    """Put each layer that is known into a `FusedLayer`, where the device has kernels; its attention is a
    `JointAttention` already."""
    if not cuda_kernels.are_available():
        return
    handed = Handed()
    places = _places(model)
    for place, following in zip(places, [*places[1:], None], strict=True):
        layer = model.model.layers[place]
        behind = None if following is None else model.model.layers[following]
        if (made := _parts_of(layer, behind)) is not None:
            call, arrays = made
            model.model.layers[place] = FusedLayer(layer, behind, handed, call, arrays, window)
    fused = [layer for layer in model.layers if isinstance(layer, FusedLayer)]
    if fused:
        started = time.monotonic()
        fused[0].compile_kernels()
        log.info("Kernels for decoding compiled in %.1f s", time.monotonic() - started)


def unfuse_layers(model: Any) -> None:
    """Undo `fuse_layers`."""
    for place in _places(model):
        if isinstance(layer := model.model.layers[place], FusedLayer):
            model.model.layers[place] = layer.inner


def _places(model: Any) -> list[int]:
    """Where this process's layers stand in the list of all (a pipeline's part has none in the other places)."""
    layers = getattr(getattr(model, "model", None), "layers", ())
    return [place for place, layer in enumerate(layers) if layer is not None]


def _parts_of(layer: nn.Module, following: nn.Module | None) -> tuple[Callable[..., Any], tuple[Arrays, ...]] | None:
    module = type(layer).__module__
    if module not in {f"mlx_lm.models.{name}" for name in FAMILIES} or not hasattr(layer.self_attn, "attend"):
        return None
    mlp = layer.mlp
    width = mlp.gate_proj.weight.shape[0]
    entry, heads = layer.input_layernorm.weight, layer.self_attn.heads
    if heads is None or heads.dtype != entry.dtype or width % 8 or entry.shape[0] % 8:
        return None
    parts = [layer.self_attn.inner.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]
    norms = [layer.input_layernorm, *_norms(layer, following)]
    if not _have_one_type([linear for part in parts for linear in part], norms):
        return None
    found = [as_product(linears) for linears in parts]
    products = [pair[0] for pair in found if pair is not None]
    if len(products) < len(found):
        return None
    eps = tuple(norm.eps for norm in _norms(layer, following))
    return _rest(products[0], products[1], products[2], eps), tuple(pair[1] for pair in found if pair is not None)
