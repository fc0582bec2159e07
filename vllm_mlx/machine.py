"""Which machine this is, without MLX: what numbers were measured on, and what a tuned profile is valid for."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path
from typing import Any

NVIDIA = Path("/proc/driver/nvidia/gpus")


def describe() -> dict[str, Any]:
    """For a report: system, processor, cores, interpreter and the versions of what computes."""
    return {
        "system": platform.platform(),
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in ("vllm-mlx", "mlx", "mlx-lm", "mlx-vlm")},
    }


def identity() -> dict[str, Any]:
    """What another speed follows from: not the system's release or its name, which change without that."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": cores(),
        "memory_gib": _memory_gib(),
        "accelerators": accelerators(),
        "mlx_cuda": any((dist.name or "").lower().startswith("mlx-cuda") for dist in distributions()),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor() -> str:
    """Its name as the maker's; empty where nobody says."""
    if sys.platform == "darwin":
        return _asked("sysctl", "-n", "machdep.cpu.brand_string")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def accelerators() -> list[str]:
    """Names of NVIDIA cards. An Apple GPU is part of the processor that `processor` names."""
    names = []
    for file in sorted(NVIDIA.glob("*/information")):
        lines = file.read_text(errors="replace").splitlines()
        names += [line.split(":", 1)[1].strip() for line in lines if line.startswith("Model:")]
    return names


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _memory_gib() -> int:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return 0
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)


def _asked(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""
