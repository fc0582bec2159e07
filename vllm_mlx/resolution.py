"""What follows from the settings, and what cannot be: the one place for derived decisions and contradictions.

Knows nothing of models but the few facts of `ModelFacts`, and nothing of the command line but the flags' names, which
its sentences use. `Settings.resolve` is the way in.
"""

from __future__ import annotations

import math

from vllm_mlx.errors import SettingsError
from vllm_mlx.settings import ModelFacts, Settings, is_loopback, setting_fields


def resolve(settings: Settings, facts: ModelFacts | None) -> tuple[Settings, tuple[str, ...]]:
    """As `Settings.resolve` says."""
    _check_values(settings)
    _check_contradictions(settings)
    notes = list(settings.notes)
    settings = _derive_server(settings, notes)
    settings = _derive_batch(settings, notes)
    settings = _derive_limits(settings, facts, notes)
    _note_idle_flags(settings, notes)
    return settings, tuple(notes)


def _check_values(settings: Settings) -> None:
    for item in setting_fields():
        value = getattr(getattr(settings, item.group), item.name)
        rule = item.option
        if value is None:
            continue
        if rule.choices and str(value) not in rule.choices:
            raise SettingsError(f"{item.label} must be one of {', '.join(rule.choices)}, not {value}.")
        if isinstance(value, float) and not math.isfinite(value):
            raise SettingsError(f"{item.label} must be a finite number.")
        if rule.minimum is not None and value < rule.minimum:
            raise SettingsError(f"{item.label} must be at least {rule.minimum:g}, not {value}.")
        if rule.maximum is not None and value > rule.maximum:
            raise SettingsError(f"{item.label} must be at most {rule.maximum:g}, not {value}.")
        if rule.above is not None and value <= rule.above:
            raise SettingsError(f"{item.label} must be greater than {rule.above:g}, not {value}.")


def _check_contradictions(settings: Settings) -> None:
    guessing = settings.speculation
    if guessing.draft_model is not None and guessing.speculation != "auto":
        raise SettingsError(f"--draft-model is of no use with --speculation {guessing.speculation}; leave one out.")
    server, batch, guards, limits, parsing = (
        settings.server, settings.batch, settings.guards, settings.limits, settings.parsing)
    if guards.memory_limit_threshold <= guards.memory_warn_threshold:
        raise SettingsError(
            f"--memory-limit-threshold ({guards.memory_limit_threshold:g}) must be greater than "
            f"--memory-warn-threshold ({guards.memory_warn_threshold:g}).")
    if batch.runtime_mode == "simple" and batch.continuous_batching:
        raise SettingsError("--runtime-mode simple and --continuous-batching contradict each other; give one of them.")
    if parsing.max_thinking_tokens is not None and parsing.reasoning_parser == "none":
        raise SettingsError(
            "--max-thinking-tokens needs a reasoning parser to know where the reasoning ends; give --reasoning-parser "
            "auto or a format's name.")
    if server.ssl_keyfile and not server.ssl_certfile:
        raise SettingsError("--ssl-keyfile needs --ssl-certfile.")
    if limits.max_request_tokens is not None and limits.max_tokens > limits.max_request_tokens \
            and "limits.max_tokens" in settings.given:
        raise SettingsError(
            f"--max-tokens ({limits.max_tokens}) must not be greater than --max-request-tokens "
            f"({limits.max_request_tokens}).")
    for alias in server.model_alias:
        name, separator, target = alias.partition("=")
        if not (name.strip() and separator and target.strip()):
            raise SettingsError(f"--model-alias takes NAME=TARGET, not {alias!r}.")
    if settings.model.distributed is not None:
        beside = settings.beside != type(settings.beside)()
        for flag, is_set in (
            ("several models", settings.is_pool), ("--mllm", settings.model.mllm is True),
            ("--disk-cache", settings.cache.disk_cache is not None),
            ("--engine-process", server.engine_process), ("models beside the served one", beside),
        ):
            if is_set:
                raise SettingsError(f"--distributed does not go together with {flag}; leave one of them out.")
    for adapter in settings.model.adapter:
        name, separator, path = adapter.partition("=")
        if not (name.strip() and separator and path.strip()) or ":" in name:
            raise SettingsError(f"--adapter takes NAME=PATH, the name without a colon, not {adapter!r}.")
    if server.api_key is not None and not server.api_key.strip():
        raise SettingsError("--api-key must not be empty.")
    if settings.mcp.mcp_in_chat and settings.mcp.mcp_config is None:
        raise SettingsError("--mcp-in-chat needs --mcp-config, which names the servers whose tools are offered.")
    if not server.host.strip():
        raise SettingsError("--host must not be empty.")


def _derive_server(settings: Settings, notes: list[str]) -> Settings:
    server = settings.server
    if server.localhost and not is_loopback(server.host):
        notes.append(f"--localhost overrides --host {server.host}.")
        settings = settings.with_values(server__host="127.0.0.1")
        server = settings.server
    has_keys = bool(server.api_key or server.api_key_file)
    if not is_loopback(server.host):
        if not has_keys:
            notes.append(f"Anyone who can reach {server.host}:{server.port} can use this server; set --api-key.")
        if not server.rate_limit:
            notes.append("No rate limit on a public address; set --rate-limit.")
    return settings


def _derive_batch(settings: Settings, notes: list[str]) -> Settings:
    batch, sampling, guessing = settings.batch, settings.sampling, settings.speculation
    if sampling.deterministic:
        forced = [flag for flag, is_set in (
            ("--continuous-batching", batch.continuous_batching),
            ("--runtime-mode batched", batch.runtime_mode == "batched"),
            (f"--max-num-seqs {batch.max_num_seqs}", "batch.max_num_seqs" in settings.given and batch.max_num_seqs > 1),
            ("--default-temperature", bool(sampling.default_temperature)),
            ("--default-top-p", sampling.default_top_p not in (None, 1.0)),
            ("--enable-prefix-cache", settings.cache.prefix_cache and "cache.prefix_cache" in settings.given),
            ("--speculation", guessing.speculation != "off" and "speculation.speculation" in settings.given),
            ("--draft-model", guessing.draft_model is not None),
        ) if is_set]
        if forced:
            notes.append(f"--deterministic overrides {', '.join(forced)}.")
        return settings.with_values(
            batch__runtime_mode="simple", batch__continuous_batching=False, batch__max_num_seqs=1,
            sampling__default_temperature=0.0, sampling__default_top_p=1.0,
            # What was computed or guessed before would show, in usage and in how the tokens come.
            cache__prefix_cache=False, speculation__speculation="off", speculation__draft_model=None)
    if batch.runtime_mode == "simple":
        if "batch.max_num_seqs" in settings.given and batch.max_num_seqs > 1:
            notes.append(f"--runtime-mode simple overrides --max-num-seqs {batch.max_num_seqs}.")
        return settings.with_values(batch__max_num_seqs=1)
    if batch.continuous_batching:
        return settings.with_values(batch__runtime_mode="batched")
    return settings


def _derive_limits(settings: Settings, facts: ModelFacts | None, notes: list[str]) -> Settings:
    limits = settings.limits
    context = facts.context_tokens if facts is not None else None
    if context is not None and limits.effective_context_tokens is not None \
            and limits.effective_context_tokens > context:
        notes.append(
            f"--effective-context-tokens {limits.effective_context_tokens} is more than the model's {context}; "
            f"{context} is used.")
        settings = settings.with_values(limits__effective_context_tokens=context)
        limits = settings.limits
    bounds = [n for n in (limits.max_request_tokens, limits.effective_context_tokens, context) if n is not None]
    if bounds and limits.max_tokens > min(bounds):
        settings = settings.with_values(limits__max_tokens=min(bounds))
    return settings


def _note_idle_flags(settings: Settings, notes: list[str]) -> None:
    """Flags that were given but can have no effect beside the others are said, not swallowed."""
    given, cache, guards = settings.given, settings.cache, settings.guards
    if cache.cache_strategy != "auto":
        state = "on" if cache.prefix_cache else "off, as --disable-prefix-cache says"
        notes.append(
            f"--cache-strategy {cache.cache_strategy} makes no difference here: there is one prefix cache, and it is "
            f"{state}.")
    if not cache.prefix_cache and given & {"cache.cache_memory_mb", "cache.cache_memory_percent"}:
        notes.append("The prefix cache is off, so its size makes no difference.")
    if "pool.memory_budget_gb" in given and not settings.is_pool:
        notes.append("--memory-budget-gb bounds several models; this server has one, which stays loaded.")
    divergence = {"guards.batch_divergence_interval", "guards.batch_divergence_threshold",
                  "guards.batch_divergence_action"}
    if not guards.batch_divergence_monitor and given & divergence:
        notes.append("The --batch-divergence flags need --batch-divergence-monitor to have an effect.")
    if guards.batch_divergence_monitor and settings.batch.max_num_seqs == 1:
        notes.append("The batch-divergence monitor has nothing to compare: sequences are computed one at a time.")
