"""Keyword arguments of `LLM` as Settings: every setting's own name, and vLLM's where it differs."""

from __future__ import annotations

import difflib
from typing import Any

from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import Settings, setting_fields

VLLM_NAMES = {
    "max_model_len": "effective_context_tokens",
    "enable_prefix_caching": "prefix_cache",
    "max_num_batched_tokens": "max_batch_tokens",
    "download_dir": None,
    "tensor_parallel_size": None,
    "gpu_memory_utilization": None,
    "disable_log_stats": None,
    "enforce_eager": None,
}
"""None: accepted, because it is in many scripts, and without a meaning here."""

# A batch waits for as long as it takes, and as much of it as there is.
OFFLINE = {"limits__timeout_s": 7 * 86400.0, "limits__max_queue": 1 << 30, "batch__runtime_mode": "batched"}


def settings_of(model: str, given: dict[str, Any]) -> Settings:
    """Raises SettingsError for a name that is no setting, with the nearest one."""
    paths = {item.name: f"{item.group}__{item.name}" for item in setting_fields()}
    values: dict[str, Any] = {**OFFLINE, "model__model": model}
    for name, value in given.items():
        own = VLLM_NAMES.get(name, name)
        if own is None:
            continue
        if own not in paths:
            near = difflib.get_close_matches(name, [*paths, *VLLM_NAMES], n=1)
            raise SettingsError(f"{name} is no setting" + (f"; did you mean {near[0]}?" if near else "."))
        values[paths[own]] = value
    settings, _ = Settings().with_values(**values).resolve()
    return settings
