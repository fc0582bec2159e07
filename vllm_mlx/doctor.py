"""`vllm-mlx doctor`: which program this is, what it runs on, and whether it works. Prints; returns the exit code.

Answers the question "which binary am I using" in one command: the interpreter, how it was installed, and, for a
checkout, its branch, commit and whether files differ from it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlparse

from vllm_mlx import __version__, blas
from vllm_mlx.errors import VllmMlxError
from vllm_mlx.settings import CpuSettings

LIBRARIES = ("mlx", "mlx-cpu", "mlx-metal", "mlx-cuda-12", "mlx-cuda-13", "mlx-lm", "mlx-vlm", "transformers",
             "huggingface_hub", "llguidance", "fastapi", "uvicorn", "numpy")


def run(cpu: CpuSettings) -> int:
    """Print every finding; 0 when the self-test passed."""
    report = blas.load(cpu.blas, cpu.blas_threads, few_row_kernels=cpu.few_row_kernels)
    for title, lines in (
        ("program", program()),
        ("libraries", libraries()),
        ("machine", machine(report)),
        ("models", model_cache()),
    ):
        print(f"{title}:")
        for line in lines:
            print(f"  {line}")
    print("self-test:")
    return 0 if all([_check(name, check) for name, check in CHECKS]) else 1


def program() -> list[str]:
    """Command, interpreter, version and kind of installation."""
    command = shutil.which("vllm-mlx")
    lines = [f"this is    {__version__}, run by {sys.executable} (Python {platform.python_version()})",
             f"package    {Path(__file__).parent}"]
    if command is None:
        lines.append("command    no vllm-mlx on the PATH")
    else:
        same = "this one" if _starts_this(Path(command)) else "another installation than this one"
        lines.append(f"command    {command} ({same})")
    return [*lines, f"installed  {install_kind()}"]


def install_kind() -> str:
    """Published tool, editable checkout, checkout run in place, or a wheel; with branch and commit for a checkout."""
    folder = Path(__file__).parents[1]
    try:
        raw = importlib.metadata.distribution("vllm-mlx").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; run in place from {folder}{_git_state(folder)}"
    origin = json.loads(raw) if raw else {}
    url = origin.get("url", "")
    if origin.get("dir_info", {}).get("editable"):
        source = Path(unquote(urlparse(url).path))
        if source.resolve() != folder.resolve():  # PYTHONPATH or the current folder came first
            return f"run in place from {folder}{_git_state(folder)}; the installed checkout {source} is not used"
        return f"editable checkout {source}{_git_state(source)}"
    kind = "uv tool" if (Path(sys.prefix) / "uv-receipt.toml").exists() else "installed package"
    url = re.sub(r"//[^/@]*@", "//", url)  # a token in the address is nobody else's business
    if "vcs_info" in origin:
        commit = origin["vcs_info"].get("commit_id", "unknown commit")[:12]
        return f"{kind}, from {url} at {commit}"
    return f"{kind}, from {url}" if url else kind


def _git_state(folder: Path) -> str:
    def git(*words: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10,
                                  check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit or not git("ls-files", "vllm_mlx/__init__.py"):
        return ", no git checkout"
    branch = git("rev-parse", "--abbrev-ref", "HEAD")
    changed = len(git("status", "--porcelain").splitlines())
    state = "1 file differs" if changed == 1 else f"{changed} files differ" if changed else "no local changes"
    return f", branch {branch} at {commit}, {state}"


def _starts_this(command: Path) -> bool:
    """Whether the console script on the PATH runs in this interpreter's environment."""
    try:
        first = command.resolve().read_bytes().splitlines()[0].decode(errors="replace")
    except (OSError, IndexError):
        return False
    return Path(sys.prefix).as_posix() in (first + command.resolve().as_posix())


def libraries() -> list[str]:
    """Versions of what matters, one a line."""
    lines = []
    for name in LIBRARIES:
        try:
            lines.append(f"{name:15} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return lines


def machine(report: blas.BlasReport) -> list[str]:
    """System, MLX's device, BLAS and memory."""
    try:
        from vllm_mlx.models.selftest import backend  # imports MLX, which must come after the BLAS

        where = backend()
    except ImportError as error:
        where = f"MLX cannot be imported: {error}"
    return [f"system     {platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} cores",
            f"backend    {where}", f"BLAS       {report}", *([f"           {report.path}"] if report.path else []),
            f"memory     {memory()}"]


def memory() -> str:
    """Total and, where the system tells, available memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = f"{total / 2**30:.1f} GiB"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
        text += f", {available / 2**30:.1f} GiB of it free"
    return text


def model_cache() -> list[str]:
    """Where hub models are kept, and how much room there is."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    models = sorted(cache.glob("models--*")) if cache.exists() else []
    return [f"cache      {cache} ({len(models)} models, {shutil.disk_usage(existing).free / 2**30:.1f} GiB free)",
            f"compiled   {blas.cache_folder()}"]


def _check(name: str, check: Callable[[], str]) -> bool:
    begin = time.perf_counter()
    try:
        finding = check()
    except (VllmMlxError, ImportError, OSError, RuntimeError, ValueError, AssertionError) as error:
        print(f"  FAILED     {name}: {type(error).__name__}: {error}")
        return False
    print(f"  ok         {name}: {finding} ({time.perf_counter() - begin:.1f} s)")
    return True


def check_demo() -> str:
    """The built-in model is in the package."""
    from vllm_mlx.models.download import resolve

    folder = resolve("demo")
    return f"{sum(file.stat().st_size for file in folder.iterdir()) / 2**20:.1f} MiB at {folder}"


def check_products() -> str:
    """MLX computes what numpy computes."""
    from vllm_mlx.models.selftest import check_products  # imports MLX, which must come after the BLAS

    return check_products()


def check_model_libraries() -> str:
    """mlx-lm and mlx-vlm can be imported together."""
    from vllm_mlx.models.selftest import check_model_libraries  # imports MLX, which must come after the BLAS

    return check_model_libraries()


CHECKS = (("matrix products", check_products), ("model libraries", check_model_libraries), ("demo model", check_demo))
