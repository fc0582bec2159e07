"""What `vllm-mlx tune` found best, kept for later starts: one JSON file for each machine, model and version.

A profile is found by a hash of all that could make other values better; after an update or on another machine there
simply is none. It is written whole or not at all. Files only, no MLX; any thread.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vllm_mlx import __version__, blas, machine
from vllm_mlx.models.profile import ModelProfile
from vllm_mlx.settings import Settings, setting_fields

FORMAT = 1
# Fields of Settings that a profile may hold. Anything else in a file is ignored.
TUNABLE = ("batch.prefill_step_size", "batch.max_num_seqs", "speculation.speculation")


@dataclass(frozen=True, slots=True)
class TunedProfile:
    """`values`: settings that were measured to be better than the defaults, by path. `measured`: what was gained, for
    people. `created`: seconds since 1970."""

    model: str
    values: Mapping[str, Any]
    measured: Mapping[str, Any] = field(default_factory=dict)
    created: float = 0.0


def default_folder() -> Path:
    """Where profiles are kept: beside the other things that can be made again."""
    return blas.cache_folder() / "tuned"


def key_of(settings: Settings, model: ModelProfile) -> str:
    """16 hex digits of machine, model, versions, and the flags that change what a step costs."""
    cache = settings.cache
    facts = {
        "format": FORMAT,
        "machine": machine.identity(),
        "versions": [__version__, *(machine.installed(name) for name in ("mlx", "mlx-lm", "mlx-vlm"))],
        "model": model.fingerprint,
        "precision": [settings.model.dtype, cache.kv_bits, cache.kv_group_size, settings.batch.batch_invariant],
        "cpu": [settings.cpu.blas, settings.cpu.blas_threads, settings.cpu.few_row_kernels],
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def path_of(settings: Settings, model: ModelProfile, folder: Path | None = None) -> Path:
    return (folder or default_folder()) / f"{key_of(settings, model)}.json"


def write(profile: TunedProfile, path: Path) -> None:
    """Whole or not at all: another start may be reading, and this one may be interrupted."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({**asdict(profile), "format": FORMAT}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


def read(path: Path) -> TunedProfile | None:
    """The profile in a file; None for no file, and for one that does not hold sound values."""
    try:
        found = json.loads(path.read_text())
        values = {name: value for name, value in found["values"].items() if _is_sound(name, value)}
        return TunedProfile(str(found["model"]), values, found.get("measured", {}), float(found["created"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def apply(settings: Settings, model: ModelProfile, folder: Path | None = None) -> Settings:
    """Settings with the profile of this model and machine, if there is one. What the operator gave wins."""
    is_other_speed = settings.sampling.deterministic or settings.model.distributed is not None
    if not settings.model.tune_profile or is_other_speed:
        return settings
    path = path_of(settings, model, folder)
    profile = read(path)
    if profile is None:
        return settings
    fixed = set(settings.given)
    if settings.speculation.draft_model is not None:
        fixed.add("speculation.speculation")  # what guessing costs is another thing then
    if settings.batch.runtime_mode == "simple":
        fixed.add("batch.max_num_seqs")
    values = {name: value for name, value in profile.values.items() if name not in fixed}
    when = time.strftime("%Y-%m-%d", time.localtime(profile.created))
    labels = {item.path: item.label for item in setting_fields()}
    shown = ", ".join(f"{labels[name]} {value}" for name, value in values.items()) or "nothing that was not given"
    note = f"Tuned profile of {when} is used ({path}): {shown}; --no-tune-profile ignores it."
    settings = settings.with_values(**{name.replace(".", "__"): value for name, value in values.items()})
    return replace(settings, notes=(*settings.notes, note))


def _is_sound(name: str, value: Any) -> bool:
    if name not in TUNABLE:
        return False
    option = next(item.option for item in setting_fields() if item.path == name)
    if option.choices:
        return value in option.choices
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return is_whole and (option.minimum or 1) <= value <= (option.maximum or value)
