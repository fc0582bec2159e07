"""How much memory this process holds, and how much it can hold. Standard library only; any thread.

Linux: resident set; what the machine can give is that plus what is available (control groups counted). macOS: the
physical footprint, which Metal's buffers are part of, against the machine's memory.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import resource
import sys
from pathlib import Path

_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current"), Path("/sys/fs/cgroup/memory.stat")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.stat"),
    ),
)
_UNLIMITED = 1 << 60


def process_bytes() -> int:
    """Bytes of memory this process holds now."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        pass  # not Linux
    if sys.platform == "darwin" and (footprint := _mac_footprint()) is not None:
        return footprint
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def capacity_bytes() -> int:
    """Bytes this process could hold: its own, plus what nobody else needs; never more than the machine has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = [available for available in (_host_available_bytes(), _cgroup_available_bytes()) if available is not None]
    return min(total, process_bytes() + min(free)) if free else total


def return_to_system() -> None:
    """Give freed heap back, where the C library would keep it for itself (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none
        if trim is not None:
            trim(0)


def _host_available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None  # not Linux
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _cgroup_available_bytes() -> int | None:
    """What the control group still allows; its page cache can be had back, so it counts as free."""
    for limit_file, usage_file, stat_file in _CGROUPS:
        try:
            limit, usage = int(limit_file.read_text()), int(usage_file.read_text())
            stat = stat_file.read_text()
        except (OSError, ValueError):
            continue  # no such control group, or "max"
        if limit < _UNLIMITED:
            fields = dict(line.split() for line in stat.splitlines() if len(line.split()) == 2)
            reclaimable = int(fields.get("inactive_file", fields.get("total_inactive_file", 0)))
            return max(0, limit - usage + reclaimable)
    return None


class _ResourceUsage(ctypes.Structure):
    """rusage_info_v0 of macOS's <sys/resource.h>."""

    _fields_ = [("uuid", ctypes.c_uint8 * 16)] + [
        (name, ctypes.c_uint64)
        for name in (
            "user_time system_time package_idle_wakeups interrupt_wakeups pageins wired_size resident_size "
            "physical_footprint start_time exit_time"
        ).split()
    ]


def _mac_footprint() -> int | None:
    """What Activity Monitor calls Memory; None when the system does not say."""
    library = ctypes.CDLL(ctypes.util.find_library("proc") or "libproc.dylib")
    usage = _ResourceUsage()
    if library.proc_pid_rusage(os.getpid(), 0, ctypes.byref(usage)) != 0:
        return None
    return int(usage.physical_footprint)
