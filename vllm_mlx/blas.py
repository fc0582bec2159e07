"""A fast BLAS under MLX's CPU backend on Linux, whose wheel links the reference one (some 30 times slower).

`load` must run before anything imports `mlx.core`: it puts `cblas_*gemm` into the process so that MLX's own lookup
finds them first. With a C compiler that is our `native/gemm.c` (few-row products itself, the rest forwarded to an
OpenBLAS); without one it is a system OpenBLAS as it is. No effect on macOS and on MLX's CUDA backend. Standard library
only.

`python -m vllm_mlx.blas` builds, loads and says what it found; `make` runs it once.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
SOURCES = ("gemm.c", "gemm_kernel.h", "row_kernel.h")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_FLAGS = ("-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared", "-pthread", "-Wno-psabi")
# Products of more rows than this are as fast, or faster, in OpenBLAS (docs/benchmarks/cpu-blas.md).
MAX_ROWS = 64
ALL_ROWS = 2**62
KERNELS = ("plain C", "AVX2", "AVX-512")
# Where distributions put an OpenBLAS with threads and 32-bit integers: Debian, Fedora, Arch, then the linker's search.
SYSTEM_NAMES = (
    "/usr/lib/{machine}-linux-gnu/openblas-pthread/libopenblas.so.0",
    "/usr/lib/{machine}-linux-gnu/openblas-openmp/libopenblas.so.0",
    "/usr/lib64/libopenblasp.so.0",
    "/usr/lib64/libopenblaso.so.0",
    "/usr/lib/libopenblas.so.0",
    "libopenblasp.so.0",
    "libopenblas.so.0",
)


@dataclass(frozen=True, slots=True)
class BlasReport:
    """What computes float32 products. `library` is none, system or numpy; `kernels` the few-row kernels' instruction
    set, None when they are not in use; `reason` says why something faster is not in use, or is empty."""

    library: str
    path: str | None = None
    threads: int | None = None
    kernels: str | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.library == "none":
            return f"MLX's own BLAS ({self.reason})"
        few_rows = f", few-row products by our own {self.kernels} kernels" if self.kernels else f" ({self.reason})"
        origin = "of the numpy wheel" if self.library == "numpy" else "of the system"
        return f"OpenBLAS {origin}, {self.threads} thread{'' if self.threads == 1 else 's'}{few_rows}"


@dataclass(frozen=True, slots=True)
class OpenBlas:
    """An OpenBLAS found on this machine; `affixes` turn `cblas_sgemm` into its own name for it."""

    kind: str
    path: str
    is_64bit: bool
    prefix: str = ""
    suffix: str = ""

    def function(self, library: ctypes.CDLL, name: str) -> ctypes.c_void_p:
        return ctypes.cast(getattr(library, f"{self.prefix}{name}{self.suffix}"), ctypes.c_void_p)


# What this process has loaded. A library cannot be taken out again, so the second call answers with the first's report.
_loaded: BlasReport | None = None


def load(choice: str = "auto", threads: int | None = None, *, few_row_kernels: bool = True,
         invariant: bool = False) -> BlasReport:
    """Make MLX use a fast BLAS; call before `mlx.core` is imported.

    `choice` is auto, system, numpy or off. `invariant` sends products of any number of rows through the few-row
    kernels, whose result for a row does not depend on the other rows. Loads once: later calls change nothing.
    """
    global _loaded
    if _loaded is None:
        max_rows = ALL_ROWS if invariant else MAX_ROWS if few_row_kernels else 0
        _loaded = _load(choice, threads or default_threads(), max_rows)
    return _loaded


def default_threads() -> int:
    """One fewer than the cores this process may use: a BLAS thread that waits for a busy core stalls all the others."""
    own = os.environ.get("OPENBLAS_NUM_THREADS", "")
    if own.isdigit() and int(own) > 0:
        return int(own)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores - 1)


def _load(choice: str, threads: int, max_rows: int) -> BlasReport:
    if choice == "off":
        return BlasReport("none", reason="switched off")
    if sys.platform != "linux":
        return BlasReport("none", reason="another one is needed on Linux only")
    if _has_cuda_backend():
        return BlasReport("none", reason="MLX's CUDA backend is installed")
    if "mlx.core" in sys.modules:
        return BlasReport("none", reason="MLX was imported before a faster one could be loaded")
    found = find_openblas(choice)
    if found is None:
        wanted = {"system": "no system OpenBLAS", "numpy": "numpy's wheel holds no OpenBLAS"}
        return BlasReport("none", reason=f"{wanted.get(choice, 'no OpenBLAS')} was found")
    try:
        shim = build()
    except BuildError as error:
        if found.is_64bit:
            found = find_openblas("system") if choice == "auto" else None
        if found is None:
            return BlasReport("none", reason=f"{error}; install a C compiler or libopenblas")
        library = ctypes.CDLL(found.path, mode=ctypes.RTLD_GLOBAL)
        _set_threads(found, library, threads)
        return BlasReport(found.kind, found.path, threads, reason=str(error))
    library = ctypes.CDLL(found.path)
    _set_threads(found, library, threads)
    level = attach(ctypes.CDLL(str(shim), mode=ctypes.RTLD_GLOBAL), found, library, threads, max_rows)
    if max_rows == 0:
        return BlasReport(found.kind, found.path, threads, reason="few-row kernels are switched off")
    return BlasReport(found.kind, found.path, threads, KERNELS[level])


def attach(shim: ctypes.CDLL, found: OpenBlas, library: ctypes.CDLL, threads: int, max_rows: int,
           limit: int = len(KERNELS) - 1) -> int:
    """Hand OpenBLAS's functions to the shim; returns the index in KERNELS of what its own kernels use."""
    configure = shim.vllm_mlx_gemm_configure
    configure.restype = ctypes.c_int
    configure.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_int,
                          ctypes.c_int]
    functions = [found.function(library, name) for name in ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")]
    return int(configure(*functions, int(found.is_64bit), max_rows, threads, limit))


def find_openblas(choice: str = "auto") -> OpenBlas | None:
    """The OpenBLAS to use. `auto` prefers the numpy wheel's: it is always there, and newer than most systems'."""
    if choice in ("auto", "numpy"):
        spec = importlib.util.find_spec("numpy")
        if spec is not None and spec.origin:
            folder = Path(spec.origin).parents[1] / "numpy.libs"
            for path in sorted(folder.glob("libscipy_openblas64_*.so")):
                return OpenBlas("numpy", str(path), is_64bit=True, prefix="scipy_", suffix="64_")
    if choice in ("auto", "system"):
        for name in SYSTEM_NAMES:
            file = name.format(machine=platform.machine())
            if file.startswith("/") and not os.path.exists(file):
                continue
            try:
                library = ctypes.CDLL(file)
            except OSError:
                continue
            if hasattr(library, "cblas_sgemm"):
                return OpenBlas("system", file, is_64bit=False)
    return None


class BuildError(Exception):
    """The shim could not be compiled; the message says why, in a few words."""


def build() -> Path:
    """The compiled shim; compiles it unless this user's cache holds it. Raises BuildError."""
    source = b"".join((NATIVE / name).read_bytes() for name in SOURCES)
    key = hashlib.sha256(source + " ".join((*COMPILE_FLAGS, platform.machine())).encode()).hexdigest()[:16]
    cached = cache_folder() / f"gemm-{key}.so"
    if _is_trusted(cached):
        return cached
    compiler = next((path for path in map(shutil.which, COMPILERS) if path), None)
    if compiler is None:
        raise BuildError("no C compiler was found")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = cached.parent
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="vllm-mlx-"))  # a home that cannot be written: compile for this run only
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".so", delete=False) as target:
        made = Path(target.name)
    try:
        result = subprocess.run(
            [compiler, *COMPILE_FLAGS, "-o", str(made), str(NATIVE / "gemm.c")],
            capture_output=True, text=True, timeout=120, check=False)
        if result.returncode != 0:
            lines = result.stderr.strip().splitlines() or ["no message"]
            cause = next((line for line in lines if "error" in line), lines[0])
            raise BuildError(f"{Path(compiler).name} failed: {cause}")
        os.chmod(made, 0o700)
        final = folder / cached.name
        os.replace(made, final)  # whole or not at all, also when two processes compile at once
        return final
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(compiler).name} could not be run ({error})") from None
    finally:
        made.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where the compiled shim is kept for the next start."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "vllm-mlx"


def _is_trusted(path: Path) -> bool:
    """Whether a cached library was written by this user, and by nobody else."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & 0o022


def _set_threads(found: OpenBlas, library: ctypes.CDLL, threads: int) -> None:
    getattr(library, f"{found.prefix}openblas_set_num_threads{found.suffix}")(ctypes.c_int(threads))


def _has_cuda_backend() -> bool:
    return any(dist.name.lower().replace("_", "-").startswith("mlx-cuda")
               for dist in importlib.metadata.distributions() if dist.name)


if __name__ == "__main__":
    print(f"BLAS: {load()}")
