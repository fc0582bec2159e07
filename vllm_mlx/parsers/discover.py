"""Finds formats: by file name or alias, or from what a model's chat template and tokenizer contain, never from the
name of a model. A format is a module in `tools/` or `reasoning/` with a `FORMAT`; there is no list to add it to.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Collection
from functools import cache
from typing import Any

from vllm_mlx.parsers import reasoning, tools
from vllm_mlx.parsers.reasoning_parser import ReasoningFormat
from vllm_mlx.parsers.tool_parser import ToolFormat


@cache
def _formats(package: str, paths: tuple[str, ...]) -> dict[str, Any]:
    """Every name and alias of a package's formats. A file name wins over an alias."""
    modules = {m.name: importlib.import_module(f"{package}.{m.name}").FORMAT for m in pkgutil.iter_modules(paths)}
    aliases = {alias: format for format in modules.values() for alias in (format.name, *format.aliases)}
    return {**aliases, **modules}


def _tool_formats() -> dict[str, ToolFormat]:
    return _formats(tools.__name__, tuple(tools.__path__))


def _reasoning_formats() -> dict[str, ReasoningFormat]:
    return _formats(reasoning.__name__, tuple(reasoning.__path__))


def find_tool_format(name: str) -> ToolFormat:
    """KeyError, with the names there are, for a name there is not."""
    return _find(name, _tool_formats())


def find_reasoning_format(name: str) -> ReasoningFormat:
    return _find(name, _reasoning_formats())


def tool_format_names() -> tuple[str, ...]:
    """Every accepted name and alias, sorted."""
    return tuple(sorted(_tool_formats()))


def reasoning_format_names() -> tuple[str, ...]:
    return tuple(sorted(_reasoning_formats()))


def choose_tool_format(chat_template: str | None, special_tokens: Collection[str] = ()) -> str | None:
    """The name of the format a model writes calls in, judged by template and special tokens; None when nothing tells.

    The most specific sign wins: the one whose texts are the longest together.
    """
    return _choose(_tool_formats(), chat_template, special_tokens)


def choose_reasoning_format(chat_template: str | None, special_tokens: Collection[str] = ()) -> str | None:
    return _choose(_reasoning_formats(), chat_template, special_tokens)


def _choose(formats: dict[str, Any], chat_template: str | None, special_tokens: Collection[str]) -> str | None:
    template = (chat_template or "").replace("\\n", "\n")
    tokens = frozenset(special_tokens)
    best: tuple[int, str] | None = None
    for format in {f.name: f for f in formats.values()}.values():
        for sign in format.signs:
            if sign.is_in(template, tokens) and (best is None or sign.weight > best[0]):
                best = (sign.weight, format.name)
    return best[1] if best else None


def _find(name: str, formats: dict[str, Any]) -> Any:
    found = {_letters(known): format for known, format in formats.items()}.get(_letters(name))
    if found is None:
        raise KeyError(f"no format {name!r}; there are {', '.join(sorted(formats))}")
    return found


def _letters(name: str) -> str:
    """What is compared: `GLM-4.5`, `glm4_5` and `glm45` are one name."""
    return re.sub(r"[\W_]", "", name.lower())
