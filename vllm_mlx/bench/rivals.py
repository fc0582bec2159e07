"""The other projects' servers that `bench` can start, and on which BLAS. Pure, but for asking a rival's version.

Each is started as its own documentation says, with its defaults; what is added is named here.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from vllm_mlx.errors import SettingsError

LAUNCHER = Path(__file__).with_name("rival.py")


class Blas(StrEnum):
    """What multiplies matrices under a rival; the values are the words of the report."""

    OPENBLAS = "same OpenBLAS"
    OURS = "our BLAS"
    INSTALLED = "as installed"


@dataclass(frozen=True, slots=True)
class Rival:
    """`arguments` hold {model} and {port}; `model_id` is what requests name, {model} for the path."""

    name: str
    module: str
    arguments: tuple[str, ...]
    model_id: str = "{model}"


HERE = ("--host", "127.0.0.1", "--port", "{port}")
QUIET = ("--log-level", "WARNING")
RIVALS = {
    rival.name: rival
    for rival in (
        Rival("mlx-lm", "mlx_lm.server", ("--model", "{model}", *HERE, *QUIET), "default_model"),
        Rival("mlx-vlm", "mlx_vlm.server", ("--model", "{model}", *HERE, *QUIET)),
        # Without this flag it answers one request after the other.
        Rival("vllm-mlx", "vllm_mlx.cli", ("serve", "{model}", *HERE, "--continuous-batching")),
    )
}


def command(rival: Rival, model: str, port: int, blas: Blas, python: str = sys.executable) -> list[str]:
    """What starts the server. `-I`: neither the folder we stand in nor PYTHONPATH may give it another package."""
    arguments = [part.format(model=model, port=port) for part in rival.arguments]
    if blas is Blas.INSTALLED:
        return [python, "-I", "-m", rival.module, *arguments]
    kind = "ours" if blas is Blas.OURS else "openblas"
    return [python, "-I", str(LAUNCHER), kind, rival.module, *arguments]


def version_of(rival: Rival, python: str) -> str:
    """The version that `python` has; raises SettingsError when it has none."""
    script = f"import importlib.metadata as m; print(m.version({rival.name!r}))"
    try:
        found = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SettingsError(f"--rival-python: {python} cannot be run ({error}).") from None
    if found.returncode:
        raise SettingsError(
            f"--rival {rival.name}: {python} has no {rival.name}. Install it in an environment of its own, and name"
            f" that: --rival-python {rival.name}=ENV/bin/python."
        )
    return found.stdout.strip()


def interpreters(named: Sequence[str], rivals: Sequence[str]) -> dict[str, str]:
    """Which interpreter starts each rival, of `NAME=PATH` or a `PATH` for all; else this one. Raises SettingsError."""
    for_all = [entry for entry in named if "=" not in entry]
    chosen = dict.fromkeys(rivals, for_all[-1] if for_all else sys.executable)
    for entry in named:
        name, separator, path = entry.partition("=")
        if not separator:
            continue
        if name not in rivals:
            raise SettingsError(f"--rival-python {entry}: {name!r} is not among the rivals; add --rival {name}.")
        chosen[name] = path
    return chosen
