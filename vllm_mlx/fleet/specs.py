"""Which models a server of several has: from the command line or from `--models-config FILE`. No MLX, any thread.

    models:
      - id: big                      # in the API; else the path
        path: mlx-community/Qwen3-30B-A3B-Instruct-2507-4bit
        aliases: [claude-sonnet-4-5] # more names; `default` is the first model's
        pinned: true                 # never unloaded, loaded at start
        settings: {max-num-seqs: 8, default-temperature: 0.2}   # flags of `serve`, for this model alone
      - {id: vectors, path: org/an-embedder, kind: embedding}   # or rerank, transcription, speech; else chat

The flags that name models beside the chat (`--embedding-model` and the like) name members of the pool, too.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from vllm_mlx.errors import SettingsError
from vllm_mlx.options import parse_value, value_type
from vllm_mlx.settings import SettingField, Settings, setting_fields

KEYS = ("id", "path", "kind", "aliases", "pinned", "settings")
CHAT = "chat"
BESIDE = {"embedding": "embedding_model", "rerank": "rerank_model", "transcription": "stt_model", "speech": "tts_model"}
"""The kinds that are no chat model, and the setting that names one where there is no pool."""
# What a model beside the chat reads of its settings.
BESIDE_FIELDS = ("model.dtype", "model.trust_remote_code", "model.offline")
EMBEDDING_FIELDS = ("beside.embedding_max_length", "beside.embedding_overflow_policy")
# What belongs to the process and not to a model.
PROCESS_GROUPS = ("server", "cpu", "pool", "beside", "mcp")
PROCESS_FIELDS = ("model.model", "model.more_models")
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One model of the pool: its names, and the settings it is loaded and served with."""

    id: str
    settings: Settings
    aliases: tuple[str, ...] = ()
    is_pinned: bool = False
    kind: str = CHAT

    @property
    def path(self) -> str:
        return self.settings.model.model


def read_specs(settings: Settings) -> tuple[ModelSpec, ...]:
    """The models that `settings` name, the default one first. Raises SettingsError, one sentence."""
    specs = [_from_name(settings, name) for name in (settings.model.model, *settings.model.more_models)]
    if settings.pool.models_config is not None:
        if "model.model" not in settings.given:
            specs = []  # the file says it all; the built-in model is served only when it is asked for
        specs += _read_file(settings, Path(settings.pool.models_config).expanduser())
    if not any(spec.kind == CHAT for spec in specs):
        raise SettingsError(
            f"--models-config {settings.pool.models_config} has no chat model; a server needs one, be it `demo`."
        )
    specs += _from_flags(settings)
    _check_names(specs)
    return tuple(replace(spec, settings=_alone(spec.settings)) for spec in specs)


def _from_flags(settings: Settings) -> list[ModelSpec]:
    named = ((kind, getattr(settings.beside, field)) for kind, field in BESIDE.items())
    return [
        ModelSpec(name, settings.with_values(model__model=name, model__more_models=()), kind=kind)
        for kind, name in named
        if name is not None
    ]


def _alone(settings: Settings) -> Settings:
    """Without the models beside it, which are members themselves; what else is said of them stays."""
    return settings.with_values(**{f"beside__{field}": None for field in BESIDE.values()})


def _from_name(settings: Settings, name: str) -> ModelSpec:
    own = settings.with_values(model__model=name, model__more_models=())
    served = settings.server.served_model_name if name == settings.model.model else None
    return ModelSpec(served or name, own)


def _read_file(settings: Settings, path: Path) -> list[ModelSpec]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--models-config {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        raise SettingsError(f"--models-config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict) or not isinstance(content.get("models"), list) or not content["models"]:
        raise SettingsError(f"--models-config {path} must hold a list named `models` with at least one model.")
    _check_keys(content, ("models",), str(path))
    return [_spec(settings, entry, f"{path}, model {number}") for number, entry in enumerate(content["models"], 1)]


def _spec(settings: Settings, entry: Any, where: str) -> ModelSpec:
    if not isinstance(entry, dict):
        raise SettingsError(f"{where}: a model is a mapping with at least a `path`, not {entry!r}.")
    _check_keys(entry, KEYS, where)
    path, aliases, pinned, own = (
        entry.get("path"), entry.get("aliases", []), entry.get("pinned", False), entry.get("settings") or {})
    kind = entry.get("kind", CHAT)
    name = entry.get("id", path)
    if not isinstance(path, str) or not path.strip():
        raise SettingsError(f"{where}: `path` must be a model folder, a hub id or `demo`.")
    if not isinstance(name, str) or not name.strip():
        raise SettingsError(f"{where}: `id` must be a name.")
    if not isinstance(aliases, list) or not all(isinstance(alias, str) and alias.strip() for alias in aliases):
        raise SettingsError(f"{where}: `aliases` must be a list of names.")
    if not isinstance(pinned, bool):
        raise SettingsError(f"{where}: `pinned` must be true or false.")
    if kind not in (CHAT, *BESIDE):
        near = _nearest(str(kind), (CHAT, *BESIDE))
        raise SettingsError(f"{where}: `kind` must be one of {', '.join((CHAT, *BESIDE))}, not {kind!r}{near}.")
    if not isinstance(own, dict):
        raise SettingsError(f"{where}: `settings` must be a mapping of flags to values.")
    own_values = _settings_of(own, kind, where)
    settings = settings.with_values(model__model=path, model__more_models=(), **own_values)
    given = settings.given | {key.replace("__", ".") for key in own_values}
    return ModelSpec(name, replace(settings, given=given), tuple(aliases), pinned, kind)


def _settings_of(own: Mapping[Any, Any], kind: str, where: str) -> dict[str, Any]:
    fields = {name: item for item in setting_fields() if _is_own(item, kind) for name in _names(item)}
    values = {}
    for key, value in own.items():
        item = fields.get(str(key).removeprefix("--").replace("_", "-"))
        if item is None:
            model = "a model" if kind == CHAT else f"{'an' if kind[0] in 'aeiou' else 'a'} {kind} model"
            raise SettingsError(f"{where}: {key!r} is no setting of {model}{_nearest(str(key), fields)}.")
        values[item.path.replace(".", "__")] = _value(item, value, f"{where}: {key}")
    return values


def _is_own(item: SettingField, kind: str) -> bool:
    if kind != CHAT:
        return item.path in BESIDE_FIELDS or (kind == "embedding" and item.path in EMBEDDING_FIELDS)
    return item.group not in PROCESS_GROUPS and item.path not in PROCESS_FIELDS


def _names(item: SettingField) -> Iterable[str]:
    flags = (item.option.flag, *item.option.aliases)
    return {item.name.replace("_", "-"), *(flag.removeprefix("--") for flag in flags if flag)}


def _value(item: SettingField, value: Any, written: str) -> Any:
    kind, is_repeated = value_type(item)
    if value is None:
        return item.default
    if is_repeated:
        return tuple(str(part) for part in value) if isinstance(value, list) else parse_value(item, str(value), written)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    return parse_value(item, str(value), written)


def _check_keys(entry: Mapping[Any, Any], known: Iterable[str], where: str) -> None:
    for key in entry:
        if key not in known:
            raise SettingsError(f"{where}: there is no key {key!r}{_nearest(str(key), known)}.")


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word.replace("_", "-"), list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_names(specs: Iterable[ModelSpec]) -> None:
    owners: dict[str, str] = {}
    for spec in specs:
        for name in (spec.id, *spec.aliases):
            if name in owners:
                raise SettingsError(f"Two models are called {name!r}; each id and alias must be one model's alone.")
            owners[name] = spec.id
