"""How many files and connections this process may have open: importing mlx-lm lowers that, in part for good.

Called around that import: it sets 2048, and 4096 as what can be had at most. No MLX here.
"""

from __future__ import annotations

import os
from contextlib import suppress

from vllm_mlx.errors import VllmMlxError

try:
    import resource
except ImportError:  # not on this system
    resource = None  # type: ignore[assignment]

NEEDED = 4096
"""What mlx-lm sets as the hard limit; whoever has less, and is not root, may not."""


def check() -> None:
    """Before mlx-lm is imported: raise where that would fail."""
    if resource is None:
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED and os.geteuid() != 0:
        raise VllmMlxError(
            f"This process may open {hard} files, and mlx-lm needs to be allowed {NEEDED}; raise the hard limit "
            f"(`ulimit -Hn`, LimitNOFILE= of systemd, `--ulimit nofile=65536` of podman and docker)."
        )


def widen() -> None:
    """After mlx-lm was imported: take as many as it has left us."""
    if resource is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):  # some systems have a lower one beside it
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
