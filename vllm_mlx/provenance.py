"""Which program a server is, for whoever reports what it did: command, interpreter, installation. No MLX.

Shown in `/health/diagnostics`; `vllm-mlx record` copies it. Secrets are left out.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_mlx import __version__
from vllm_mlx.doctor import install_kind
from vllm_mlx.options import ENV_PREFIX, env_name
from vllm_mlx.settings import setting_fields

HIDDEN = "***"


def describe() -> dict[str, Any]:
    """This process. Asks git where it runs from a checkout, so it takes a moment."""
    return {
        "version": __version__,
        "command": shlex.join(without_secrets(sys.orig_argv)),
        "environment": settings_environment(os.environ),
        "interpreter": sys.executable,
        "package": str(Path(__file__).parent),
        "install": install_kind(),
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """The command line with the values of secret flags hidden, however they are written."""
    secret = {item.option.flag for item in setting_fields() if item.option.secret}
    shown: list[str] = []
    hides_next = False
    for word in arguments:
        flag, equals, _ = word.partition("=")
        if hides_next:
            shown.append(HIDDEN)
        else:
            shown.append(f"{flag}={HIDDEN}" if equals and flag in secret else word)
        hides_next = word in secret and not hides_next
    return shown


def settings_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The settings that the environment gave."""
    secret = {env_name(item) for item in setting_fields() if item.option.secret}
    return {
        name: HIDDEN if name in secret or "KEY" in name else value
        for name, value in sorted(environ.items())
        if name.startswith(ENV_PREFIX)
    }
