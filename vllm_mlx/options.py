"""Settings as operators write them: flags, environment names, `--help` sections and docs/configuration.md, all derived
from the fields in `settings.py`. Also the older names that still parse, and the ones whose feature is not here.

`python -m vllm_mlx.options` prints docs/configuration.md. Imports only the standard library, so that `--help` is quick.
"""

from __future__ import annotations

import argparse
import difflib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from vllm_mlx import settings as settings_module
from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import SettingField, Settings, setting_fields

ENV_PREFIX = "VLLM_MLX_"
# Names with our prefix that are not settings: the launcher scripts read the first two, tests the third, and
# the last two tell the engine's process of a listening socket
# that it inherits from its front, and of a pipe that the front holds open for as long as it lives.
LISTEN_FD = "VLLM_MLX_LISTEN_FD"
PARENT_FD = "VLLM_MLX_PARENT_FD"
OTHER_ENV_NAMES = frozenset(
    {"VLLM_MLX_PYTHON", "VLLM_MLX_CLIENT_API_KEY", "VLLM_MLX_TEST_MODEL", LISTEN_FD, PARENT_FD}
)
TRUE_WORDS = frozenset({"1", "true", "yes", "on"})
FALSE_WORDS = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Legacy:
    """A flag of the reference systems whose name makes no difference here: it parses, and a note says why."""

    note: str
    takes_value: bool = True


LEGACY: dict[str, Legacy] = {
    "--prefill-batch-size": Legacy("prompts are computed in chunks under --max-batch-tokens, not in batches"),
    "--completion-batch-size": Legacy("--max-num-seqs alone bounds the sequences computed together"),
    "--mllm-prefill-step-size": Legacy("image prompts are computed in chunks like text, by --prefill-step-size"),
    "--stream-interval": Legacy("a stream carries each step's tokens as soon as they are known"),
    "--prefix-cache-size": Legacy("the prefix cache is bounded by bytes: --cache-memory-mb"),
    "--no-memory-aware-cache": Legacy("there is one prefix cache, bounded by bytes", takes_value=False),
    "--use-paged-cache": Legacy("there is one prefix cache, and it shares blocks", takes_value=False),
    "--max-cache-blocks": Legacy("the prefix cache is bounded by bytes: --cache-memory-mb"),
    "--kv-cache-min-quantize-tokens": Legacy("with --kv-bits all keys and values are quantised"),
    "--mllm-vision-cache-size": Legacy("encoded images are bounded by bytes: --encoder-cache-mb"),
}

# Older names that do have a meaning here: they set a field, in `_apply_older_names`.
OLDER_NAMES = {
    "--chunked-prefill-tokens": "Older name of --max-batch-tokens.",
    "--kv-cache-quantization": "Older name of --kv-bits 8.",
    "--kv-cache-quantization-bits": "Bits for --kv-cache-quantization.",
    "--disable-mllm-vision-cache": "Older name of --encoder-cache-mb 0.",
}

OLDER_NAMES_WITH_VALUE = ("--chunked-prefill-tokens", "--kv-cache-quantization-bits")

# Flags that people bring from elsewhere and that are not settings here; each sentence says what to do instead.
ELSEWHERE: dict[str, str] = {
    "--enable-thinking": "thinking is a request field: send \"enable_thinking\": true or false with the request",
    "--disable-thinking": "thinking is a request field: send \"enable_thinking\": true or false with the request",
    "--enable-mtp": "MTP heads are used by --speculation auto where the model has some that can be used",
    "--mtp-num-draft-tokens": "--num-draft-tokens bounds all guesses alike",
    "--mtp-optimistic": "drafts are always verified here; see --speculation",
}

SECTIONS = {
    "server": "server", "model": "model", "pool": "several models", "sampling": "sampling defaults", "cache": "cache",
    "batch": "batching", "speculation": "speculation", "limits": "limits", "guards": "guards",
    "parsing": "reasoning and tools",
    "agents": "agents' prompts", "media": "images and video", "beside": "models beside the served one",
    "mcp": "MCP tools",
    "cpu": "CPU backend on Linux",
}


class UsageError(Exception):
    """A command line that cannot be parsed; the message is one sentence."""


class SentenceParser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence raised as UsageError, with no usage text before it."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def value_type(item: SettingField) -> tuple[type, bool]:
    """The plain type of a field's value, and whether it is a repeatable tuple of that type."""
    group_class = type(getattr(Settings(), item.group))
    hint = typing.get_type_hints(group_class, vars(settings_module))[item.name]
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    origin = typing.get_origin(hint)
    if origin is tuple:
        return str, True
    return (dict, False) if origin is not None else (hint, False)


def parse_value(item: SettingField, text: str, written: str) -> Any:
    """The field's value from what an operator wrote; `written` names the flag or variable for the error."""
    kind, is_repeated = value_type(item)
    if is_repeated:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if kind is bool:
        if text.strip().lower() in TRUE_WORDS:
            return True
        if text.strip().lower() in FALSE_WORDS:
            return False
        raise SettingsError(f"{written} takes true or false, not {text!r}.")
    if kind is dict:
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise SettingsError(f"{written} takes a JSON object such as {{\"enable_thinking\": false}}, not {text!r}.")
        return value
    if kind is int or kind is float:
        if text == "auto" and item.default is None:
            return None
        try:
            return kind(text)
        except ValueError:
            noun = "a whole number" if kind is int else "a number"
            raise SettingsError(f"{written} takes {noun}, not {text!r}.") from None
    return text


def env_name(item: SettingField) -> str:
    if item.option.env:
        return item.option.env
    flag = item.option.flag
    if item.option.off_flag or flag is None or flag == "--paged-cache-block-size":
        return ENV_PREFIX + item.name.upper()
    return ENV_PREFIX + flag.removeprefix("--").replace("-", "_").upper()


def add_settings(parser: argparse.ArgumentParser, names: frozenset[str] | None = None) -> None:
    """Add every setting to `parser`, one section a group; `names` (paths) limits it to some, without old spellings."""
    sections: dict[str, argparse._ArgumentGroup] = {}
    for item in setting_fields():
        if names is not None and item.path not in names:
            continue
        section = sections.get(item.group)
        if section is None:
            section = sections[item.group] = parser.add_argument_group(SECTIONS[item.group])
        _add_field(section, item)
    if names is None:
        hidden = parser.add_argument_group("older names", "More are accepted; docs/configuration.md lists them.")
        for flag, legacy in LEGACY.items():
            hidden.add_argument(flag, dest=f"legacy:{flag}", default=argparse.SUPPRESS, help=argparse.SUPPRESS,
                                **({} if legacy.takes_value else {"action": "store_true"}))  # type: ignore[arg-type]
        for flag, help_text in OLDER_NAMES.items():
            shape = {"metavar": "N"} if flag in OLDER_NAMES_WITH_VALUE else {"action": "store_true"}
            hidden.add_argument(flag, dest=f"older:{flag}", default=argparse.SUPPRESS, help=help_text,
                                **shape)  # type: ignore[arg-type]


def _add_field(section: argparse._ArgumentGroup, item: SettingField) -> None:
    rule = item.option
    kind, is_repeated = value_type(item)
    help_text = f"{rule.help}{_default_suffix(item)} [{env_name(item)}]".replace("%", "%%")
    if rule.flag is None:
        section.add_argument(item.path, metavar=rule.metavar, nargs="*" if is_repeated else "?",
                             default=argparse.SUPPRESS, help=help_text)
        return
    if kind is bool:
        section.add_argument(rule.flag, *rule.aliases, dest=f"on:{item.path}", action="store_true",
                             default=argparse.SUPPRESS, help=help_text)
        if rule.off_flag:
            section.add_argument(rule.off_flag, dest=f"off:{item.path}", action="store_true",
                                 default=argparse.SUPPRESS, help=f"The opposite of {rule.flag}.")
        return
    metavar = rule.metavar or ("{" + ",".join(rule.choices) + "}" if rule.choices else "N" if kind in (int, float) else
                               "TEXT")
    section.add_argument(rule.flag, *rule.aliases, dest=item.path, metavar=metavar, default=argparse.SUPPRESS,
                         help=help_text, action="append" if is_repeated else "store")


def _default_suffix(item: SettingField) -> str:
    default = item.default
    if default is None or default == () or default is False:
        return ""
    return f" Default: {_shown(default)}."


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def settings_from(arguments: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """Settings from parsed arguments and the environment: flag > environment > default."""
    values: dict[str, Any] = {}
    notes: list[str] = []
    known_env = set(OTHER_ENV_NAMES)
    for item in setting_fields():
        variable = env_name(item)
        known_env.add(variable)
        if environ.get(variable, "") != "":
            values[item.path] = parse_value(item, environ[variable], variable)
        if item.path in arguments:
            values[item.path] = _from_flag(item, arguments[item.path])
        is_on, is_off = f"on:{item.path}" in arguments, f"off:{item.path}" in arguments
        if is_on and is_off:
            raise SettingsError(
                f"{item.option.flag} and {item.option.off_flag} contradict each other; give one of them.")
        if is_on or is_off:
            values[item.path] = is_on
    _apply_older_names(arguments, values, notes)
    for name in sorted(environ):
        if name.startswith(ENV_PREFIX) and name not in known_env:
            near = difflib.get_close_matches(name, known_env, n=1)
            notes.append(f"{name} is no setting of this program" + (f"; did you mean {near[0]}?" if near else "."))
    settings = Settings(given=frozenset(values), notes=tuple(notes))
    return settings.with_values(**{path.replace(".", "__"): value for path, value in values.items()})


def _from_flag(item: SettingField, raw: Any) -> Any:
    if isinstance(raw, list):
        return tuple(raw)
    return parse_value(item, raw, item.label)


def _apply_older_names(arguments: Mapping[str, Any], values: dict[str, Any], notes: list[str]) -> None:
    older = {key.partition(":")[2]: value for key, value in arguments.items() if key.startswith("older:")}
    fields = {item.path: item for item in setting_fields()}
    budget = older.get("--chunked-prefill-tokens")
    if budget is not None:
        number = parse_value(fields["batch.max_batch_tokens"], budget, "--chunked-prefill-tokens")
        if number == 0:
            notes.append("--chunked-prefill-tokens 0 makes no difference here: prefill is always in chunks.")
        else:
            values.setdefault("batch.max_batch_tokens", number)
    bits = parse_value(fields["cache.kv_bits"], older.get("--kv-cache-quantization-bits", "8"),
                       "--kv-cache-quantization-bits")
    if "--kv-cache-quantization" in older:
        values.setdefault("cache.kv_bits", bits)
    elif "--kv-cache-quantization-bits" in older:
        notes.append("--kv-cache-quantization-bits has no effect without --kv-cache-quantization.")
    if "--disable-mllm-vision-cache" in older:
        values["media.encoder_cache_mb"] = 0
    for key in arguments:
        if key.startswith("legacy:"):
            flag = key.partition(":")[2]
            notes.append(f"{flag} makes no difference here: {LEGACY[flag].note}.")


def known_flags() -> list[str]:
    """Every flag that `serve` understands, older names included."""
    flags = ["--help", *LEGACY, *OLDER_NAMES]
    for item in setting_fields():
        flags += [flag for flag in (item.option.flag, item.option.off_flag, *item.option.aliases) if flag]
    return flags


def explain_unknown(unknown: Sequence[str], known: Sequence[str]) -> str:
    """One sentence about the first argument that no parser knows, with the nearest name."""
    word = unknown[0].partition("=")[0]
    if word in ELSEWHERE:
        return f"there is no {word} flag: {ELSEWHERE[word]}."
    if not word.startswith("-"):
        return f"unexpected argument {word!r}."
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"unknown flag {word}; did you mean {near[0]}?" if near else f"unknown flag {word}."


def reference() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration", "",
        "Made by `make docs` from `vllm_mlx/settings.py`; a test fails when it is stale. A flag wins over the "
        "environment, the environment over the default. Booleans in the environment are `true` or `false`, lists are "
        "separated by commas. Everything here is read once, at start.", ""]
    group = ""
    for item in setting_fields():
        if item.group != group:
            group = item.group
            about = " ".join((type(getattr(Settings(), group)).__doc__ or "").split())
            title = SECTIONS[group]
            lines += [f"## {title[0].upper()}{title[1:]}", "", about, "",
                      "| flag | environment | default | effect |", "| --- | --- | --- | --- |"]
        lines.append(_reference_row(item))
        if _is_last_of_group(item):
            lines.append("")
    lines += ["## Older names", "",
              "Flags of earlier servers. These are accepted and mean the same as a flag above:", "",
              "| flag | meaning |", "| --- | --- |"]
    lines += [f"| `{flag}` | {text} |" for flag, text in OLDER_NAMES.items()]
    lines += ["", "These are accepted, make no difference, and are named once in the start-up log:", "",
              "| flag | why |", "| --- | --- |"]
    lines += [f"| `{flag}` | {legacy.note[0].upper()}{legacy.note[1:]}. |" for flag, legacy in LEGACY.items()]
    lines += ["", "`--enable-thinking` is not a flag: thinking is the request field `enable_thinking`.", ""]
    return "\n".join(lines)


def _reference_row(item: SettingField) -> str:
    rule = item.option
    positional = f"{rule.metavar} ..." if item.default == () else rule.metavar
    names = [rule.flag or positional or item.name, *rule.aliases, *([rule.off_flag] if rule.off_flag else [])]
    default = f"`{_shown(item.default)}`" if item.default not in (None, ()) else ""
    values = f" One of {', '.join(f'`{choice}`' for choice in rule.choices)}." if rule.choices else ""
    effect = f"{rule.help}{values}".replace("|", "\\|")
    return f"| {', '.join(f'`{name}`' for name in names)} | `{env_name(item)}` | {default} | {effect} |"


def _is_last_of_group(item: SettingField) -> bool:
    return item.path == [other.path for other in setting_fields() if other.group == item.group][-1]


if __name__ == "__main__":
    print(reference(), end="")
