"""`vllm-mlx service`: the server as a background service of this user, by launchd (macOS) or systemd (Linux).

One plain file is written, which a person can read and change; `uninstall` takes it away again. Nothing runs as root.
"""

from __future__ import annotations

import argparse
import os
import plistlib
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from vllm_mlx.errors import VllmMlxError

LABEL = "vllm-mlx"
Run = Callable[[Sequence[str]], int]


class ServiceError(VllmMlxError):
    """The service cannot be managed; one sentence."""


def run(parsed: argparse.Namespace) -> int:
    manager = for_platform(sys.platform, Path.home(), _run)
    match parsed.action:
        case "install":
            path = manager.install([sys.executable, "-m", "vllm_mlx.cli", "serve", *parsed.arguments])
            print(f"Written: {path}\nIt runs now and at login. `vllm-mlx service logs` shows what it says;\n"
                  "`vllm-mlx service uninstall` takes it away.")  # fmt: skip
        case "start":
            manager.start()
        case "stop":
            manager.stop()
        case "status":
            return manager.status()
        case "logs":
            return manager.logs()
        case "uninstall":
            path = manager.uninstall()
            print(f"Removed: {path}")
    return 0


class Manager(ABC):
    """`run` executes a command line and returns its exit code; a test gives one that only notes it."""

    def __init__(self, home: Path, run: Run) -> None:
        self._home = home
        self._run = run

    @property
    @abstractmethod
    def path(self) -> Path:
        """The one file that is written."""

    @abstractmethod
    def content(self, command: Sequence[str]) -> bytes: ...

    @abstractmethod
    def start(self) -> None: ...

    @abstractmethod
    def stop(self) -> None: ...

    @abstractmethod
    def status(self) -> int: ...

    @abstractmethod
    def logs(self) -> int: ...

    def install(self, command: Sequence[str]) -> Path:
        """Write the file and start. Installing again replaces it; a first time that fails leaves nothing."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        is_new = not self.path.exists()
        if not is_new:
            self.stop()
        # The arguments may hold an API key.
        self.path.touch(mode=0o600)
        self.path.chmod(0o600)
        self.path.write_bytes(self.content(command))
        try:
            self._after_change()
            self.start()
        except ServiceError as error:
            if not is_new:
                raise
            self.path.unlink()
            raise ServiceError(f"{error} Nothing was installed; `vllm-mlx serve` runs in any terminal.") from None
        return self.path

    def uninstall(self) -> Path:
        """Stop, and take the file away; also where the system's manager of services cannot be reached."""
        self._require()
        with suppress(ServiceError):
            self.stop()
        self.path.unlink()
        with suppress(ServiceError):
            self._after_change()
        return self.path

    def _after_change(self) -> None:  # noqa: B027  (nothing to do for launchd)
        """The file is new, or gone."""

    def _require(self) -> None:
        if not self.path.exists():
            raise ServiceError("There is no such service yet; `vllm-mlx service install` makes one.")

    def _must(self, *command: str) -> None:
        if code := self._run(command):
            raise ServiceError(f"`{shlex.join(command)}` failed (exit code {code}).")


class Systemd(Manager):
    """A user unit. It runs while the user is logged in; `loginctl enable-linger` keeps it beyond that."""

    @property
    def path(self) -> Path:
        config = Path(os.environ.get("XDG_CONFIG_HOME") or self._home / ".config")
        return config / "systemd/user" / f"{LABEL}.service"

    def content(self, command: Sequence[str]) -> bytes:
        # In a unit `%` and `$` have meanings of their own.
        words = " ".join(shlex.quote(word).replace("%", "%%").replace("$", "$$") for word in command)
        return (
            "[Unit]\nDescription=vllm-mlx, an inference server\nAfter=network-online.target\n\n"
            f"[Service]\nExecStart={words}\nRestart=on-failure\nRestartSec=5\nTimeoutStopSec=45\n"
            "Environment=PYTHONUNBUFFERED=1\n\n"
            "[Install]\nWantedBy=default.target\n"
        ).encode()

    def start(self) -> None:
        self._require()
        self._must("systemctl", "--user", "enable", "--now", LABEL)

    def stop(self) -> None:
        self._require()
        self._must("systemctl", "--user", "disable", "--now", LABEL)

    def status(self) -> int:
        return self._run(("systemctl", "--user", "--no-pager", "status", LABEL))

    def logs(self) -> int:
        return self._run(("journalctl", "--user", "--unit", LABEL, "--lines", "200", "--follow"))

    def _after_change(self) -> None:
        self._must("systemctl", "--user", "daemon-reload")


class Launchd(Manager):
    """A launch agent; it begins at login and is started again when it fails."""

    @property
    def path(self) -> Path:
        return self._home / "Library/LaunchAgents" / f"{LABEL}.plist"

    @property
    def log_path(self) -> Path:
        return self._home / "Library/Logs" / f"{LABEL}.log"

    def content(self, command: Sequence[str]) -> bytes:
        return plistlib.dumps({
            "Label": LABEL, "ProgramArguments": list(command), "RunAtLoad": True,
            "KeepAlive": {"SuccessfulExit": False}, "ExitTimeOut": 45, "ProcessType": "Interactive",
            "EnvironmentVariables": {"PYTHONUNBUFFERED": "1"},
            "StandardOutPath": str(self.log_path), "StandardErrorPath": str(self.log_path),
        })  # fmt: skip

    def start(self) -> None:
        self._require()
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        self._must("launchctl", "bootstrap", self._domain, str(self.path))

    def stop(self) -> None:
        self._require()
        self._run(("launchctl", "bootout", f"{self._domain}/{LABEL}"))  # not running is no error

    def status(self) -> int:
        return self._run(("launchctl", "print", f"{self._domain}/{LABEL}"))

    def logs(self) -> int:
        return self._run(("tail", "-n", "200", "-F", str(self.log_path)))

    @property
    def _domain(self) -> str:
        return f"gui/{os.getuid()}"


def for_platform(platform: str, home: Path, run: Run) -> Manager:
    if platform == "darwin":
        return Launchd(home, run)
    if platform.startswith("linux"):
        return Systemd(home, run)
    raise ServiceError(f"Services are managed on macOS and Linux only, not on {platform}.")


def _run(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise ServiceError(f"{command[0]} is not on this machine; run `vllm-mlx serve` in a terminal.") from None
    except KeyboardInterrupt:  # following a log ends so
        return 0
