"""One block of KV as one file: what it is named by, how it is written, read and checked. No MLX, no threads.

A block is KV of a run of tokens (`kv`) or the whole state of layers that cannot be sliced after them (`state`). It is
named by its content's cause: the model, and the hash chain of all tokens up to its start and end. A file is safetensors
with a checksum in its header; it is written beside its place and renamed, so a name never shows a torn file.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from safetensors.numpy import save_file

from vllm_mlx.errors import VllmMlxError

FORMAT = "vllm-mlx-kv-2"
KEY_BYTES = 16
SUFFIX = ".safetensors"
_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
    "U64": "uint64", "I64": "int64", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip


class DamagedBlock(VllmMlxError):
    """A file that is not what its name promises: torn, changed, or of another format."""


@dataclass(frozen=True, slots=True)
class Packed:
    """KV as the disk sees it: arrays, and `structure`, by which the codec that packed them puts them together again."""

    arrays: tuple[np.ndarray, ...]
    structure: str

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)


@dataclass(frozen=True, slots=True)
class Record:
    """A block without its contents. `start == end` for a `state`; `nbytes` is the size of its file.

    `links` are the hashes at the ends of the blocks of tokens in it, so that a prompt that leaves a run half way can
    use its beginning.
    """

    model: str
    kind: str
    start: int
    end: int
    start_key: bytes
    end_key: bytes
    nbytes: int = 0
    links: bytes = b""

    @property
    def name(self) -> str:
        return blake2b(
            "\n".join((FORMAT, self.model, self.kind, self.start_key.hex(), self.end_key.hex())).encode(),
            digest_size=KEY_BYTES,
        ).hexdigest()


def root_key(namespace: str) -> bytes:
    """Where the hash chain of a namespace begins. The model is not in it: it is in the block's name."""
    return blake2b(namespace.encode(), digest_size=KEY_BYTES, person=b"kv namespace").digest()


def chain(key: bytes, tokens: Sequence[int], block_size: int) -> list[bytes]:
    """The chain's next links after `key`, one for each whole block of `tokens`."""
    links = []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        block = array("q", tokens[start : start + block_size])
        key = blake2b(key + block.tobytes(), digest_size=KEY_BYTES).digest()
        links.append(key)
    return links


def path_of(folder: Path, name: str) -> Path:
    return folder / "blocks" / name[:2] / (name + SUFFIX)


def write(folder: Path, record: Record, packed: Packed) -> int:
    """Put a block in its place, whole or not at all; returns the file's bytes. Raises OSError."""
    place = path_of(folder, record.name)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_suffix(f".{os.getpid()}.tmp")
    metadata = {
        "format": FORMAT,
        "model": record.model,
        "kind": record.kind,
        "start": str(record.start),
        "end": str(record.end),
        "start_key": record.start_key.hex(),
        "end_key": record.end_key.hex(),
        "links": record.links.hex(),
        "structure": packed.structure,
        "checksum": _checksum(packed.arrays),
    }
    try:
        try:
            save_file({f"{i:05d}": np.ascontiguousarray(a) for i, a in enumerate(packed.arrays)}, beside, metadata)
        except OSError:
            raise
        except Exception as error:  # the library has an error class of its own for a disk that is full or gone
            raise OSError(str(error)) from error
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
            size = os.fstat(file.fileno()).st_size
        os.replace(beside, place)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return size


def read_record(file: Path) -> Record:
    """What a file says it holds, after checking that it is as long as it should be and has the right name."""
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        header = _parse_header(file, opened.read(8), opened, size)
    record = _record(file, header["__metadata__"], size)
    if record.name != file.name.removesuffix(SUFFIX):
        raise DamagedBlock(f"{file} is not the block it is named after.")
    return record


def read(folder: Path, record: Record) -> Packed:
    """A block's contents, mapped, not copied, after its checksum agreed. Raises DamagedBlock, and OSError."""
    file = path_of(folder, record.name)
    with open(file, "rb") as opened:
        size = os.fstat(opened.fileno()).st_size
        header = _parse_header(file, opened.read(8), opened, size)
        data_start = opened.tell()
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
    metadata = header.pop("__metadata__")
    found = _record(file, metadata, size)
    if found.name != record.name:
        raise DamagedBlock(f"{file} holds another block than its name says.")
    arrays = []
    for name in sorted(header):
        tensor = header[name]
        dtype, (begin, end) = np.dtype(_DTYPES[tensor["dtype"]]), tensor["data_offsets"]
        flat = np.frombuffer(mapped, dtype, (end - begin) // dtype.itemsize, data_start + begin)
        arrays.append(flat.reshape(tensor["shape"]))
    packed = Packed(tuple(arrays), metadata["structure"])
    if _checksum(packed.arrays) != metadata["checksum"]:
        raise DamagedBlock(f"The checksum of {file} does not agree with its contents.")
    return packed


def _parse_header(file: Path, length: bytes, opened: Any, size: int) -> dict[str, Any]:
    try:
        (num_bytes,) = struct.unpack("<Q", length)
        if num_bytes > size:
            raise ValueError("header longer than the file")
        header: dict[str, Any] = json.loads(opened.read(num_bytes))
        ends = [t["data_offsets"][1] for name, t in header.items() if name != "__metadata__"]
        if 8 + num_bytes + max(ends, default=0) != size or "checksum" not in header["__metadata__"]:
            raise ValueError("wrong length")
        return header
    except (struct.error, ValueError, KeyError, TypeError, IndexError) as error:
        raise DamagedBlock(f"{file} is not a whole safetensors file ({error}).") from error


def _record(file: Path, metadata: dict[str, str], size: int) -> Record:
    try:
        if metadata["format"] != FORMAT:
            raise ValueError(f"format {metadata['format']}")
        keys = bytes.fromhex(metadata["start_key"]), bytes.fromhex(metadata["end_key"])
        return Record(
            metadata["model"],
            metadata["kind"],
            int(metadata["start"]),
            int(metadata["end"]),
            *keys,
            nbytes=size,
            links=bytes.fromhex(metadata["links"]),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise DamagedBlock(f"{file} is not a block of this format ({error}).") from error


def _checksum(arrays: Sequence[np.ndarray]) -> str:
    """Of the bytes and of where one array ends; 128 bits, made for finding damage, not for fending off forgers."""
    state = xxhash.xxh3_128()
    for a in arrays:
        state.update(f"{a.dtype}{a.shape}".encode())
        state.update(np.ascontiguousarray(a).reshape(-1).view(np.uint8).data)
    return state.hexdigest()
