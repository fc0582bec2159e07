"""LoRA adapters in a running model: rows of one forward pass may each use another one. MLX thread only.

A layer that some adapter changes is put into an `AdaptedLinear`, as in `grouped.py`: a module of the tree replaced by
another. It holds the adapters' matrices as stacks [slots, in, r] and [slots, r, out]; slot 0 is zero, for rows without
an adapter. Which row uses which slot is said once for each forward pass; with no adapter in use, the layer is the plain
one. Rows are multiplied by their own slots with `mx.gather_mm`, the segment-wise product of Punica (Chen et al., 2023)
and S-LoRA (Sheng et al., 2023) in MLX's words; when all rows use one slot, by a plain product.

Where a model is split over processes, each holds its part of the matrices: of `b` where the layer's outputs are shared
out, of `a` where its inputs are, whose low-rank products are then added up (as in S-LoRA's tensor parallelism).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import ModelLoadError
from .adapter_files import LowRank, read_adapter
from .grouped import Around, RowWindow

SPLIT_OUT = (nn.AllToShardedLinear, nn.QuantizedAllToShardedLinear)
SPLIT_IN = (nn.ShardedToAllLinear, nn.QuantizedShardedToAllLinear)
QUANTIZED = (nn.QuantizedLinear, nn.QuantizedAllToShardedLinear, nn.QuantizedShardedToAllLinear)
LINEAR = (nn.Linear, nn.QuantizedLinear, *SPLIT_OUT, *SPLIT_IN)


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """`rank` is the largest of its layers."""

    name: str
    rank: int
    num_layers: int
    nbytes: int


class RowSlots:
    """The slots of the tokens of the pass that is being built; `window` tells which rows a grouped layer is at."""

    def __init__(self, window: RowWindow) -> None:
        self._window = window
        self._slots: tuple[int, ...] = ()
        self._known: dict[Sequence[int] | None, tuple[tuple[int, ...], mx.array | None]] = {}

    def set(self, slots: Sequence[int]) -> None:
        """One slot for each token or row that the model is called with, in order."""
        self._slots = tuple(slots) if any(slots) else ()
        self._known = {}

    def of_rows(self) -> tuple[tuple[int, ...], mx.array | None]:
        """The slots of a layer's rows, and unless all are one, the same as uint32 [rows]; empty when none is in use."""
        rows = self._window.rows
        if not self._slots:
            return (), None
        if rows not in self._known:
            slots = self._slots if rows is None else tuple(self._slots[i] for i in rows)
            self._known[rows] = slots, mx.array(slots, dtype=mx.uint32) if len(set(slots)) > 1 else None
        return self._known[rows]


class AdaptedLinear(nn.Module):
    """A linear layer (plain or quantised, whole or a process's part) with the low-rank parts of its adapters.

    `num_in` and `num_out` are the whole layer's.
    """

    def __init__(self, inner: nn.Module, slots: RowSlots) -> None:
        super().__init__()
        self.inner = inner
        self._slots = slots
        shape = inner.weight.shape
        group = inner.group if isinstance(inner, (*SPLIT_OUT, *SPLIT_IN)) else None
        self._rank: int = group.rank() if group is not None else 0
        num_parts: int = group.size() if group is not None else 1
        self._adds_up = group if isinstance(inner, SPLIT_IN) else None
        self._own_in = shape[1] * 32 // inner.bits if isinstance(inner, QUANTIZED) else shape[1]
        self._own_out = shape[0]
        self.num_in = self._own_in * (num_parts if isinstance(inner, SPLIT_IN) else 1)
        self.num_out = self._own_out * (num_parts if isinstance(inner, SPLIT_OUT) else 1)
        dtype = inner.scales.dtype if isinstance(inner, QUANTIZED) else inner.weight.dtype
        self._dtype = dtype if mx.issubdtype(dtype, mx.floating) else mx.bfloat16  # scales may be bytes
        self._parts: dict[int, LowRank] = {}
        self._a: mx.array | None = None
        self._b: mx.array | None = None

    def __getattr__(self, name: str) -> Any:
        if name in self or "inner" not in self:
            return super().__getattr__(name)
        return getattr(self["inner"], name)

    def fits(self, part: LowRank) -> bool:
        return bool(part.a.shape[0] == self.num_in and part.b.shape[1] == self.num_out)

    def put(self, num_slots: int, changes: dict[int, LowRank | None]) -> None:
        """Have `num_slots` slots, and other parts in some of them; None empties a slot."""
        for slot, part in changes.items():
            self._parts.pop(slot, None)
            if part is not None:
                own = self._own(part)
                self._parts[slot] = LowRank(own.a.astype(self._dtype), own.b.astype(self._dtype))
        rank = max((part.a.shape[1] for part in self._parts.values()), default=0)
        self._a = mx.stack([self._padded(slot, rank, "a") for slot in range(num_slots)]) if rank else None
        self._b = mx.stack([self._padded(slot, rank, "b") for slot in range(num_slots)]) if rank else None
        if rank:
            mx.eval(self._a, self._b)

    @property
    def is_plain(self) -> bool:
        return not self._parts

    def _own(self, part: LowRank) -> LowRank:
        """This process's part of the matrices."""
        a, b, rank = part.a, part.b, self._rank
        if self._own_in != self.num_in:
            a = a[rank * self._own_in : (rank + 1) * self._own_in]
        if self._own_out != self.num_out:
            b = b[:, rank * self._own_out : (rank + 1) * self._own_out]
        return LowRank(a, b)

    def _padded(self, slot: int, rank: int, half: str) -> mx.array:
        part = self._parts.get(slot)
        if part is None:
            return mx.zeros((self._own_in, rank) if half == "a" else (rank, self._own_out), self._dtype)
        missing = rank - part.a.shape[1]
        if half == "a":
            return mx.pad(part.a, [(0, 0), (0, missing)])
        return mx.pad(part.b, [(0, missing), (0, 0)])

    def __call__(self, x: mx.array) -> mx.array:
        y: mx.array = self.inner(x)
        slots, array = self._slots.of_rows()
        if not slots or self._a is None or self._b is None or not any(slot in self._parts for slot in slots):
            return y
        # [rows, L, in] by each row's own [in, r]; a layer called with flat tokens (experts) never gets here.
        low = x @ self._a[slots[0]] if array is None else mx.gather_mm(x, self._a, rhs_indices=array)
        if self._adds_up is not None:
            low = mx.distributed.all_sum(low, group=self._adds_up)
        return y + (low @ self._b[slots[0]] if array is None else mx.gather_mm(low, self._b, rhs_indices=array))


class AdapterBank:
    """The adapters of one model. Costs nothing until the first is loaded."""

    def __init__(self, model: Any, window: RowWindow) -> None:
        self._model = model
        self._window = window
        self._rows = RowSlots(window)
        self._slots: dict[str, int] = {}
        self._num_slots = 1
        self._layers: dict[str, AdaptedLinear] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._slots)

    def load(self, name: str, folder: Path) -> AdapterFacts:
        """Read an adapter and put it into the model. Raises ModelLoadError when it is not one of this model."""
        whole = read_adapter(folder)
        linears = dict(linear_layers(self._model))
        for path, part in whole.items():
            self._check(name, path, part, linears.get(path) or self._like(path, linears))
        parts = {path: part for path, part in whole.items() if path in linears}
        slot = self._slots.get(name) or self._free_slot()
        self._num_slots = max(self._num_slots, slot + 1)
        for path in parts:
            if path not in self._layers:
                place = linears[path]
                self._layers[path] = AdaptedLinear(place.module, self._rows)
                place.put(self._layers[path])
        for path, layer in self._layers.items():
            layer.put(self._num_slots, {slot: parts.get(path)})
        self._slots[name] = slot
        self._window.is_adapted = True
        nbytes = sum(part.a.nbytes + part.b.nbytes for part in whole.values())
        return AdapterFacts(name, max(part.a.shape[1] for part in whole.values()), len(whole), nbytes)

    def unload(self, name: str) -> None:
        """Take an adapter out; with the last one the model is as it was."""
        slot = self._slots.pop(name)
        for layer in self._layers.values():
            layer.put(self._num_slots, {slot: None})
        linears = dict(linear_layers(self._model))
        for path in [path for path, layer in self._layers.items() if layer.is_plain]:
            linears[path].put(self._layers.pop(path).inner)
        if not self._slots:
            self._num_slots = 1
            self._window.is_adapted = False

    def close(self) -> None:
        """Let go of the model."""
        self._model = None
        self._layers, self._slots = {}, {}

    def use(self, names: Sequence[str]) -> None:
        """The adapter of each row ("" for none) of the forward pass that is built next."""
        if self._slots:
            self._rows.set([self._slots[name] if name else 0 for name in names])

    def _free_slot(self) -> int:
        taken = set(self._slots.values())
        return next(slot for slot in range(1, len(taken) + 2) if slot not in taken)

    def _like(self, path: str, linears: Mapping[str, Place]) -> Place | None:
        """For a layer that another process of a pipeline has: the same one of a block that is here."""
        _, number, *rest = path.split(".", 2)
        if not number.isdigit() or not 0 <= int(number) < num_blocks(self._model):
            return None
        return next((place for other, place in linears.items() if other.split(".", 2)[2:] == rest), None)

    def _check(self, name: str, path: str, part: LowRank, place: Place | None) -> None:
        if place is None:
            raise ModelLoadError(f"The adapter {name} changes {path}, which this model has not: it is another model's.")
        probe = place.module if isinstance(place.module, AdaptedLinear) else None
        layer = probe or AdaptedLinear(place.module, self._rows)
        if isinstance(layer.inner, SPLIT_OUT) and "qkv" in place.name:
            raise ModelLoadError(
                f"The adapter {name} changes {path}, a fused layer that several processes share out by its parts; "
                "adapters on such layers are not possible with --distributed tensor."
            )
        if not layer.fits(part):
            raise ModelLoadError(
                f"The adapter {name} does not fit {path}: it is made for a layer from {part.a.shape[0]} to "
                f"{part.b.shape[1]}, this one goes from {layer.num_in} to {layer.num_out}; it is another model's."
            )


@dataclass(frozen=True)
class Place:
    """Where a linear layer stands in the tree of modules."""

    parent: nn.Module
    name: str

    @property
    def module(self) -> nn.Module:
        module: nn.Module = getattr(self.parent, self.name)
        return module

    def put(self, module: nn.Module) -> None:
        setattr(self.parent, self.name, module)


def num_blocks(model: Any) -> int:
    """Blocks of the whole model where it is a pipeline's part; else none is elsewhere."""
    if getattr(getattr(model, "model", None), "pipeline_size", 1) == 1:
        return 0
    return int(model.args.num_hidden_layers)


def linear_layers(model: Any) -> Iterator[tuple[str, Place]]:
    """The linear layers of a model's decoder by path (`layers.0.self_attn.q_proj`), adapted ones included.

    In a pipeline these are the ones of this process, with their numbers in the whole model.
    """
    first = getattr(getattr(model, "model", None), "start_idx", 0)
    for number, layer in enumerate(getattr(model, "layers", ()), first):
        yield from _linears_below(layer.inner if isinstance(layer, Around) else layer, f"layers.{number}")


def _linears_below(module: nn.Module, path: str) -> Iterator[tuple[str, Place]]:
    for name, child in module.children().items():
        if not isinstance(child, nn.Module):
            continue  # lists of modules hold experts, which adapters do not reach
        if isinstance(child, (*LINEAR, AdaptedLinear)):
            yield f"{path}.{name}", Place(module, name)
        elif isinstance(child, Around):
            yield from _linears_below(child.inner, f"{path}.{name}")
        else:
            yield from _linears_below(child, f"{path}.{name}")
