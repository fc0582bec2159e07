"""How much memory a model may take here. No MLX import of its own: the caller says what the device reports."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_CGROUP_FILES = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)
_DEVICE_FIELDS = ("max_recommended_working_set_size", "total_memory", "memory_size")


def available_memory_bytes(device_info: Mapping[str, Any], *, has_gpu: bool) -> int:
    """Bytes that weights may fill: the accelerator's if there is one, else what this process can still get."""
    if has_gpu:
        for key in _DEVICE_FIELDS:
            value = device_info.get(key)
            if isinstance(value, int) and value > 0:
                return value
    limits = [_host_available_bytes()]
    for limit_file, usage_file in _CGROUP_FILES:
        limit, usage = _read_int(limit_file), _read_int(usage_file)
        if limit is not None and usage is not None and limit < 1 << 60:
            limits.append(max(0, limit - usage))
    return min(limits)


def _host_available_bytes() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _read_int(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None  # no such control group, or "max"
