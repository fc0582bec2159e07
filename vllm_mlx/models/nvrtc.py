"""CUDA sources compiled at run time, and kept for the next start. No MLX.

MLX compiles kernels too, but with headers whose parsing takes a second for each, at every start. The compiler is the
one that MLX's CUDA backend brought into the process.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute


class CompileError(Exception):
    """There is no compiler, or it refused; the message says why."""


def compiled(source: str, macros: Mapping[str, object]) -> bytes:
    """A cubin for this process's first device. Raises CompileError."""
    options = [f"--gpu-architecture=sm_{_capability()}", "--std=c++17", *(f"-D{k}={v}" for k, v in macros.items())]
    key = hashlib.sha256("\0".join((source, str(_version()), *options)).encode()).hexdigest()
    kept = _folder() / f"{key}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        made = _compile(source, options)
    try:
        kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=kept.parent, delete=False) as file:
            file.write(made)
        os.replace(file.name, kept)  # whole or not at all
    except OSError:
        pass  # a home that cannot be written: compiled again at the next start
    return made


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "vllm-mlx" / "cuda"


def _compile(source: str, options: list[str]) -> bytes:
    library = _library()
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"decode.cu", 0, None, None))
    try:
        arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), arguments):
            raise CompileError(_read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace"))
        return _read(program, "CUBIN")
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _read(program: ctypes.c_void_p, what: str) -> bytes:
    library, size = _library(), ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(code: int) -> None:
    if code:
        raise CompileError(f"NVRTC's error {code}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The library as the process has it loaded already, wherever it came from."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError as error:
        raise CompileError(str(error)) from None
    paths = {line.split(maxsplit=5)[-1] for line in maps.splitlines() if "libnvrtc.so" in line}
    if not paths:
        raise CompileError("NVRTC is not in this process")
    return ctypes.CDLL(paths.pop())


@functools.cache
def _version() -> tuple[int, int]:
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


@functools.cache
def _capability() -> int:
    """90 for 9.0."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CompileError(str(error)) from None
    parts = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int()
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, 0):
            raise CompileError("the driver does not say what the device is capable of")
        parts.append(value.value)
    return parts[0] * 10 + parts[1]
