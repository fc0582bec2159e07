"""Which sampling a request gets: its own word, else the server's flag, else the model's generation_config.json, else
the built-in value. One function, the same for every protocol; it also says where each value came from.

Ranges are checked by the wire types already; they are checked again here because other callers exist.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.request import SamplingOverrides

if TYPE_CHECKING:
    from vllm_mlx.settings import SamplingSettings

BUILT_IN: Mapping[str, Any] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "min_tokens": 0,
    "xtc_probability": 0.0,
    "xtc_threshold": 0.1,
}

# What --deterministic makes of every request, whatever it says.
_DETERMINISTIC: Mapping[str, Any] = {
    "temperature": 0.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "seed": 0,
    "xtc_probability": 0.0,
}

# name: lowest, highest, whether the lowest itself is refused
_RANGES: Mapping[str, tuple[float, float, bool]] = {
    "temperature": (0.0, 100.0, False),
    "top_p": (0.0, 1.0, True),
    "top_k": (0, 2**31, False),
    "min_p": (0.0, 1.0, False),
    "seed": (-(2**63), 2**64 - 1, False),
    "presence_penalty": (-2.0, 2.0, False),
    "frequency_penalty": (-2.0, 2.0, False),
    "repetition_penalty": (0.0, 10.0, True),
    "min_tokens": (0, 2**31, False),
    "xtc_probability": (0.0, 1.0, False),
    "xtc_threshold": (0.0, 0.5, False),
}
MAX_LOGPROBS = 20

Provenance = dict[str, dict[str, Any]]


def choose_sampling(
    overrides: SamplingOverrides, settings: SamplingSettings, model: Mapping[str, Any], *, vocab_size: int
) -> tuple[SamplingParams, Provenance]:
    """The sampling of one request, and for each value where it came from: request, flag, generation_config, built-in,
    deterministic or frequency_penalty_mode."""
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for name, built_in in BUILT_IN.items():
        candidates = (
            ("request", getattr(overrides, name)),
            ("flag", getattr(settings, f"default_{name}", None)),
            ("generation_config", model.get(name)),
        )
        sources[name], values[name] = next(((s, v) for s, v in candidates if v is not None), ("built-in", built_in))
    if values["top_k"] == -1:  # the usual way to say "off" elsewhere
        values["top_k"] = 0
    _check_ranges(values, sources)
    _check_logit_bias(overrides.logit_bias, vocab_size)
    _check_logprobs(overrides.num_logprobs)

    if settings.frequency_penalty_mode == "repetition" and values["frequency_penalty"]:
        if sources["repetition_penalty"] != "request":
            values["repetition_penalty"] = max(0.01, 1.0 + values["frequency_penalty"])
            sources["repetition_penalty"] = "frequency_penalty_mode"
        values["frequency_penalty"] = 0.0
        sources["frequency_penalty"] = "frequency_penalty_mode"
    if settings.deterministic:
        values.update(_DETERMINISTIC)
        sources.update(dict.fromkeys(_DETERMINISTIC, "deterministic"))

    sampling = SamplingParams(**values, logit_bias=dict(overrides.logit_bias), num_logprobs=overrides.num_logprobs)
    return sampling, {name: {"value": values[name], "source": sources[name]} for name in values}


def _check_ranges(values: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    for name, (lowest, highest, is_open) in _RANGES.items():
        value = values[name]
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if is_number and lowest <= value <= highest and not (is_open and value == lowest):
            continue
        bounds = f"{'above' if is_open else 'at least'} {lowest:g} and at most {highest:g}"
        origin = "" if sources[name] == "request" else f" (set by {sources[name].replace('_', ' ')})"
        raise InvalidRequest(f"{name} must be a number {bounds}, not {value!r}{origin}.", param=name)


def _check_logit_bias(bias: Mapping[int, float], vocab_size: int) -> None:
    for token_id, value in bias.items():
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(
                f"logit_bias names token {token_id}, but this model's tokens are 0 to {vocab_size - 1}.",
                param="logit_bias",
            )
        if not -100 <= value <= 100:
            raise InvalidRequest(f"logit_bias values lie between -100 and 100, not {value}.", param="logit_bias")


def _check_logprobs(num: int | None) -> None:
    if num is not None and not 0 <= num <= MAX_LOGPROBS:
        raise InvalidRequest(f"At most {MAX_LOGPROBS} top logprobs can be asked for, not {num}.", param="top_logprobs")
