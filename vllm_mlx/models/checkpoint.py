"""The weight files of a model folder, seen through their headers: names, shapes, dtypes, and whether they are whole.

Reads a few kilobytes a file; no MLX. A half-finished download is told apart from a model that never was.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError

INDEX_NAME = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 256 << 20
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_DTYPES_8BIT = {"F8_E4M3": "float8", "F8_E5M2": "float8"}


@dataclass(frozen=True)
class Checkpoint:
    """Shapes are as stored (packed when quantised), parameters counted unpacked, `dtype` the commonest float."""

    files: tuple[Path, ...]
    shapes: Mapping[str, tuple[int, ...]]
    num_bytes: int
    num_parameters: int
    dtype: str


def read_checkpoint(path: Path, *, quantization: Mapping[str, Any]) -> Checkpoint:
    """Headers of all weight files of a folder; raises ModelLoadError when one is absent or cut short."""
    files = _weight_files(path)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    num_bytes = 0
    for file in files:
        header, data_bytes = _read_header(file)
        num_bytes += data_bytes
        for name, entry in header.items():
            if name != "__metadata__":
                tensors[name] = (entry["dtype"], tuple(entry["shape"]))
    if not tensors:
        raise ModelLoadError(f"The weight files in {path} hold no tensors; download the model again.")
    return Checkpoint(
        files=files,
        shapes={name: shape for name, (_, shape) in tensors.items()},
        num_bytes=num_bytes,
        num_parameters=_num_parameters(tensors, quantization),
        dtype=_common_dtype(tensors),
    )


def _weight_files(path: Path) -> tuple[Path, ...]:
    index_file = path / INDEX_NAME
    if index_file.is_file():
        try:
            weight_map = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelLoadError(f"{index_file} is damaged; download the file again.") from None
        missing = [name for name in names if not (path / name).is_file()]
        # Some conversions keep the index of the checkpoint they were made from beside one file of another name.
        if missing and not (len(missing) == len(names) and (path / "model.safetensors").is_file()):
            raise ModelLoadError(
                f"{path} is incomplete: {len(missing)} of {len(names)} weight files are missing "
                f"(first: {missing[0]}); finish the download."
            )
        if not missing and names:
            return tuple(path / name for name in names)
    files = tuple(sorted(f for f in path.glob("*.safetensors") if not f.name.startswith("consolidated")))
    files = tuple(f for f in files if f.name.startswith("model")) or files
    if files:
        return files
    if any(path.glob("*.incomplete")) or any(path.glob("*.part")):
        raise ModelLoadError(f"{path} is incomplete: no weight file has arrived yet; finish the download.")
    if any(path.glob("*.gguf")):
        raise ModelLoadError(f"{path} holds GGUF weights; serve an MLX or safetensors version of this model instead.")
    if any(path.glob("*.bin")) or any(path.glob("*.pth")) or any(path.glob("*.pt")):
        raise ModelLoadError(f"{path} holds PyTorch weights only; convert them with `python -m mlx_lm convert`.")
    raise ModelLoadError(f"{path} holds no *.safetensors weights; finish the download, or check the path.")


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """Header and data size of a safetensors file: 8 bytes of length, JSON, data."""
    size = file.stat().st_size
    cut_short = f"{file} is cut short"
    with file.open("rb") as stream:
        start = stream.read(8)
        if start.startswith(b"version "):
            raise ModelLoadError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull` in its folder.")
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(_MAX_HEADER_BYTES, size - 8):
            raise ModelLoadError(f"{cut_short} or not a safetensors file; download it again.")
        try:
            header = json.loads(stream.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            raise ModelLoadError(f"{file} has a damaged header; download it again.") from None
    data_bytes = max(ends, default=0)
    if 8 + length + data_bytes > size:
        raise ModelLoadError(
            f"{cut_short}: {size} bytes of {8 + length + data_bytes}; delete it and finish the download."
        )
    return header, data_bytes


def _num_parameters(tensors: Mapping[str, tuple[str, tuple[int, ...]]], quantization: Mapping[str, Any]) -> int:
    total = 0
    for name, (dtype, shape) in tensors.items():
        layer, _, leaf = name.rpartition(".")
        if leaf in ("scales", "biases") and f"{layer}.weight" in tensors:
            continue
        count = math.prod(shape)
        if dtype == "U32" and f"{layer}.scales" in tensors:
            per_layer = quantization.get(layer)
            bits = per_layer.get("bits") if isinstance(per_layer, dict) else quantization.get("bits")
            count = count * 32 // (bits if isinstance(bits, int) and bits > 0 else 4)
        total += count
    return total


def _common_dtype(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> str:
    sizes: dict[str, int] = {}
    for dtype, shape in tensors.values():
        name = _DTYPES.get(dtype) or _DTYPES_8BIT.get(dtype)
        if name:
            sizes[name] = sizes.get(name, 0) + math.prod(shape)
    return max(sizes, key=lambda name: sizes[name], default="float32")
