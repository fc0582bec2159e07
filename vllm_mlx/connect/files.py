"""Changes to other programs' settings files: merged in, with a backup beside, and nothing else in the file touched.

A file that cannot be read for sure (JSON with comments, a broken one) is not written: the person is shown what to add.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_mlx.errors import VllmMlxError

BEGIN, END = "# >>> vllm-mlx connect >>>", "# <<< vllm-mlx connect <<<"


@dataclass(frozen=True, slots=True)
class Change:
    """`content` is merged into the file at `path`: a mapping for json and yaml, lines of text for toml."""

    path: Path
    kind: str
    content: Mapping[str, Any] | str

    def text(self) -> str:
        """What is added, as it stands in the file."""
        return self.content if isinstance(self.content, str) else _dump(self.kind, self.content)

    def merged(self) -> str:
        """The whole file as it would be; VllmMlxError where it cannot be told."""
        try:
            before = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            before = ""
        except (OSError, UnicodeDecodeError) as error:
            raise VllmMlxError(f"{self.path} cannot be read ({error}); nothing was written.") from error
        if isinstance(self.content, str):
            return self._with_block(before)
        return _dump(self.kind, merge(self._read(before), self.content))

    def _read(self, text: str) -> dict[str, Any]:
        if not text.strip():
            return {}
        try:
            value = _load(self.kind, text)
        except ValueError as error:
            raise VllmMlxError(
                f"{self.path} is not plain {self.kind.upper()} (comments?), so it was not touched; add by hand what is "
                f"shown without --write. ({error})"
            ) from None
        if not isinstance(value, dict):
            raise VllmMlxError(f"{self.path} holds no settings that could be added to; nothing was written.")
        return value

    def _with_block(self, before: str) -> str:
        """The file with our block, in place of an earlier one or at the end."""
        head, found, rest = before.partition(BEGIN)
        tail = rest.partition(END)[2].lstrip("\n") if found else ""
        parts = [head.rstrip("\n"), f"{BEGIN}\n{self.content.strip()}\n{END}", tail.rstrip("\n")]  # type: ignore[union-attr]
        after = "\n\n".join(part for part in parts if part) + "\n"
        if self.kind == "toml":
            try:
                tomllib.loads(after)
            except tomllib.TOMLDecodeError as error:
                raise VllmMlxError(
                    f"{self.path} would not be valid with what is to be added ({error}); nothing was written."
                ) from None
        return after


def merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """`new` over `old`: objects are merged; of lists of named things one of the same name is replaced, others stay."""
    merged = dict(old)
    for key, value in new.items():
        before = merged.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping):
            merged[key] = merge(before, value)
        elif isinstance(value, list) and isinstance(before, list):
            names = {_name(item) for item in value}
            merged[key] = [item for item in before if _name(item) not in names] + value
        else:
            merged[key] = value
    return merged


def _name(item: Any) -> Any:
    return (item.get("id") or item.get("name")) if isinstance(item, Mapping) else item


def write(change: Change, clock: Callable[[], float] = time.time) -> Path | None:
    """Write the change, whole or not at all. Returns the backup's path; None when there was no file, or no change."""
    after = change.merged()
    path = change.path
    backup = None
    if path.exists():
        before = path.read_bytes()
        if before == after.encode():
            return None
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(clock()))
        backup = path.with_name(f"{path.name}.{stamp}.bak")
        backup.write_bytes(before)
        backup.chmod(path.stat().st_mode & 0o777)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(after)
    # A key may be inside: a new file is its owner's alone (as mkstemp made it), an old one stays as it was.
    if path.exists():
        os.chmod(name, path.stat().st_mode & 0o777)
    os.replace(name, path.resolve() if path.is_symlink() else path)
    return backup


def _load(kind: str, text: str) -> Any:
    if kind == "json":
        return json.loads(text)
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error).splitlines()[0]) from error


def _dump(kind: str, value: Mapping[str, Any]) -> str:
    if kind == "json":
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    import yaml

    return yaml.safe_dump(dict(value), sort_keys=False, allow_unicode=True)
