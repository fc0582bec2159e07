"""Machines for tests: Linux network namespaces on one switch, each with an address of its own. Needs root.

    this one ── veth ──┐
    machine 0 ── veth ─┤ bridge, in a namespace of its own
    machine 1 ── veth ─┘
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """`prefix` before a command runs it there."""

    name: str
    address: str

    @property
    def prefix(self) -> tuple[str, ...]:
        return ("ip", "netns", "exec", self.name)

    @contextmanager
    def unplugged(self) -> Iterator[None]:
        """Nothing that is sent arrives any more, and nobody is told."""
        _run("ip", "-n", self.name, "link", "set", "eth0", "down")
        try:
            yield
        finally:
            _run("ip", "-n", self.name, "link", "set", "eth0", "up")


class NotPermitted(Exception):
    """No namespaces here; the message says why."""


@contextmanager
def machines(count: int) -> Iterator[Sequence[Machine]]:
    """So many machines that reach each other and are reached from here."""
    if shutil.which("ip") is None:
        raise NotPermitted("there is no `ip` command")
    tag, net = f"{os.getpid() % 100000}x{random.randrange(100)}", f"198.18.{random.randrange(1, 255)}"
    switch = f"vmx{tag}s"
    made: list[str] = []
    try:
        _run("ip", "netns", "add", switch)
        made.append(switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        _run("ip", "link", "add", f"vmx{tag}", "type", "veth", "peer", "name", "here", "netns", switch)
        _run("ip", "addr", "add", f"{net}.1/24", "dev", f"vmx{tag}")
        _run("ip", "link", "set", f"vmx{tag}", "up")
        _plug(switch, "here")
        found = []
        for number in range(count):
            machine = Machine(f"vmx{tag}m{number}", f"{net}.{number + 10}")
            _run("ip", "netns", "add", machine.name)
            made.append(machine.name)
            port = f"port{number}"
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", machine.name)
            _plug(switch, port)
            _run("ip", "-n", machine.name, "addr", "add", f"{machine.address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", machine.name, "link", "set", device, "up")
            found.append(machine)
        yield found
    finally:
        for name in made:  # their links, and the one here, go with them
            subprocess.run(["ip", "netns", "del", name], check=False)


def _plug(switch: str, port: str) -> None:
    _run("ip", "-n", switch, "link", "set", port, "master", "bridge")
    _run("ip", "-n", switch, "link", "set", port, "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise NotPermitted(f"`{' '.join(command)}` failed: {done.stderr.strip()}")
