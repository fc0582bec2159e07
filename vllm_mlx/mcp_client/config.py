"""The file of --mcp-config: which MCP servers there are, and which of their tools may be used.

JSON or YAML, with the servers under `servers`, or under `mcpServers` as other programs write it. A command is a program
and a list of arguments, never a line for a shell. `${NAME}` in a value stands for an environment variable, so that
secrets need not stand in the file; what came from there, and every header and variable, is never shown.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from vllm_mlx.errors import SettingsError

_NAME = re.compile(r"[A-Za-z0-9_-]{1,32}")
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")
_TRANSPORTS = {"stdio": "stdio", "http": "http", "streamable-http": "http", "streamable_http": "http"}
_KEYS = (
    "transport", "type", "command", "args", "env", "cwd", "url", "headers", "enabled", "disabled", "timeout", "tools",
    "description",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class McpServerConfig:
    """One server: a program (`command`) or an address (`url`).

    `tools` are the names, or patterns such as `read_*`, that may be used; None is all of them. `timeout_s` None is the
    program's own. `secrets` are texts that must not be shown, wherever an error might repeat them.
    """

    name: str
    command: str | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    tools: tuple[str, ...] | None = None
    timeout_s: float | None = None
    secrets: frozenset[str] = frozenset()

    @property
    def transport(self) -> str:
        return "stdio" if self.command is not None else "streamable-http"

    def allows(self, tool: str) -> bool:
        return self.tools is None or any(fnmatchcase(tool, pattern) for pattern in self.tools)

    def conceal(self, text: str) -> str:
        """`text` without anything secret."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return text


def read_config(path: str, environ: Mapping[str, str] = os.environ) -> tuple[McpServerConfig, ...]:
    """The servers that are not disabled; raises SettingsError, one sentence, that names the server and the key."""
    where = f"--mcp-config {path}"
    try:
        content = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))  # JSON is YAML
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{where} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"{where} is neither JSON nor YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise SettingsError(f"{where} must hold an object with `servers` or `mcpServers`.")
    both = [content[key] for key in ("servers", "mcpServers") if key in content]
    if not both:
        raise SettingsError(f"{where} has neither `servers` nor `mcpServers`.")
    servers: list[McpServerConfig] = []
    for group in both:
        if not isinstance(group, dict):
            raise SettingsError(f"{where}: `servers` must map names to servers.")
        for name, entry in group.items():
            at = f"{where}, server {name!r}"
            if not isinstance(name, str) or not _NAME.fullmatch(name):
                raise SettingsError(f"{at}: a name has up to 32 letters, digits, - and _.")
            if any(server.name == name for server in servers):
                raise SettingsError(f"{at} is there twice.")
            if (server := _server(name, entry, at, environ)) is not None:
                servers.append(server)
    return tuple(servers)


def _server(name: str, entry: Any, at: str, environ: Mapping[str, str]) -> McpServerConfig | None:
    if not isinstance(entry, dict):
        raise SettingsError(f"{at} must be an object with `command` or `url`.")
    for key in entry:
        if key not in _KEYS:
            near = difflib.get_close_matches(str(key), _KEYS, n=1)
            raise SettingsError(f"{at}: there is no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "."))
    if entry.get("enabled") is False or entry.get("disabled") is True:
        return None
    secrets: set[str] = set()

    def text(value: Any, key: str) -> str:
        if not isinstance(value, str):
            raise SettingsError(f"{at}: `{key}` must be text, not {value!r}.")

        def put(match: re.Match[str]) -> str:
            if (found := environ.get(match[1])) is None:
                raise SettingsError(f"{at}: `{key}` names ${{{match[1]}}}, which is not in the environment.")
            secrets.add(found)
            return found

        return _VARIABLE.sub(put, value)

    def texts(key: str) -> dict[str, str]:
        value = entry.get(key) or {}
        if not isinstance(value, dict):
            raise SettingsError(f"{at}: `{key}` must map names to texts.")
        found = {str(k): text(str(v) if isinstance(v, int | float) else v, f"{key}.{k}") for k, v in value.items()}
        secrets.update(found.values())
        return found

    transport = entry.get("transport", entry.get("type"))
    if transport is not None and transport not in _TRANSPORTS:
        raise SettingsError(
            f"{at}: the transport {transport!r} is not served; stdio and streamable-http are"
            + (" (most servers that speak sse speak streamable-http too)." if transport == "sse" else ".")
        )
    command, url = entry.get("command"), entry.get("url")
    if (command is None) == (url is None):
        raise SettingsError(f"{at} needs either `command` (a program) or `url` (an address).")
    if transport is not None and (_TRANSPORTS[transport] == "stdio") != (command is not None):
        raise SettingsError(f"{at}: the transport {transport!r} does not go with `{'url' if url else 'command'}`.")
    args, tools, timeout = entry.get("args") or [], entry.get("tools"), entry.get("timeout")
    for key, value in (("args", args), ("tools", [] if tools is None else tools)):
        if not isinstance(value, list) or not all(isinstance(item, str | int | float) for item in value):
            raise SettingsError(f"{at}: `{key}` must be a list of texts.")
    if timeout is not None and (not isinstance(timeout, int | float) or isinstance(timeout, bool) or timeout <= 0):
        raise SettingsError(f"{at}: `timeout` must be a number of seconds above 0.")
    if command is not None:
        command = text(command, "command")
        if not command.strip() or " " in command.strip() and not Path(command).exists():
            raise SettingsError(f"{at}: `command` is a program alone; its arguments go into `args`.")
    if url is not None:
        url = text(url, "url")
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SettingsError(f"{at}: `url` must be an http or https address.")
        secrets.update(secret for secret in (parts.password, parts.query) if secret)
    return McpServerConfig(
        name=name,
        command=command,
        args=tuple(text(str(item), "args") for item in args),
        env=texts("env"),
        cwd=text(entry["cwd"], "cwd") if entry.get("cwd") is not None else None,
        url=url,
        headers=texts("headers"),
        tools=None if tools is None else tuple(map(str, tools)),
        timeout_s=timeout,
        # A secret of a letter or two would blot out half of every sentence.
        secrets=frozenset(secret for secret in secrets if len(secret) >= 4),
    )
