"""Settings: one field is one flag, one environment name, one row of docs; contradictions are sentences."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path

import pytest

from vllm_mlx.cli import build_parser
from vllm_mlx.errors import SettingsError
from vllm_mlx.options import ELSEWHERE, LEGACY, OLDER_NAMES, env_name, known_flags, reference, settings_from
from vllm_mlx.settings import Settings, is_loopback, setting_fields

DOCS = Path(__file__).parents[1] / "docs" / "configuration.md"
PACKAGE = Path(__file__).parents[1] / "vllm_mlx"


@dataclass(frozen=True)
class Facts:
    context_tokens: int | None = 8192


def parse(*words: str, **environ: str) -> Settings:
    parsed, unknown = build_parser().parse_known_args(["serve", *words])
    assert not unknown
    return settings_from({key: value for key, value in vars(parsed).items() if key != "command"}, environ)


def resolve(*words: str, **environ: str) -> tuple[Settings, str]:
    settings, notes = parse(*words, **environ).resolve(Facts())
    return settings, " | ".join(notes)


def test_docs_are_what_the_settings_say():
    assert DOCS.read_text() == reference(), "run `make docs`"


def test_flags_and_environment_names_are_unique():
    flags = known_flags()
    assert len(flags) == len(set(flags))
    names = [env_name(item) for item in setting_fields()]
    assert len(names) == len(set(names))
    assert not set(flags) & set(ELSEWHERE)


def test_groups_and_settings_are_frozen():
    for group in fields(Settings):
        if is_dataclass(group.default):
            assert group.default.__dataclass_params__.frozen
    with pytest.raises(AttributeError):
        Settings().server.port = 1  # type: ignore[misc]


def test_every_flag_of_the_operator_guide_parses():
    settings = parse(
        "some/model", "--localhost", "--port", "8001", "--runtime-mode", "auto", "--cache-strategy", "auto",
        "--default-temperature", "0.7", "--default-top-p", "0.9", "--enable-auto-tool-choice", "--tool-call-parser",
        "auto", "--strict-model-id", "--mllm", "--batch-divergence-monitor", "--batch-divergence-threshold", "0.95",
        "--batch-divergence-action", "serialize", "--timeout", "900", "--continuous-batching", "--deterministic",
        "--effective-context-tokens", "4096", "--memory-warn-threshold", "60", "--memory-limit-threshold", "80",
        "--memory-action", "reduce-context", "--memory-monitor-interval", "2", "--reasoning-parser", "qwen3",
        "--max-thinking-tokens", "64", "--api-key", "k", "--download-timeout", "10", "--download-retries", "5",
        "--offline", "--repetition-policy", "strict")
    assert settings.model.model == "some/model"
    assert settings.model.mllm is True
    assert settings.limits.timeout_s == 900
    assert settings.guards.batch_divergence_action == "serialize"
    assert settings.given >= {"server.port", "model.offline", "parsing.max_thinking_tokens"}


def test_flag_wins_over_environment_and_environment_over_default():
    assert parse().server.port == 8000
    assert parse(VLLM_MLX_PORT="9000").server.port == 9000
    assert parse("--port", "9001", VLLM_MLX_PORT="9000").server.port == 9001
    assert parse("--enable-prefix-cache", VLLM_MLX_PREFIX_CACHE="off").cache.prefix_cache is True


@pytest.mark.parametrize(("variable", "text", "path", "value"), [
    ("VLLM_MLX_MLLM", "false", "model.mllm", False),
    ("VLLM_MLX_API_KEY", "secret", "server.api_key", "secret"),
    ("VLLM_MLX_CORS_ORIGIN", "http://a, http://b", "server.cors_origin", ("http://a", "http://b")),
    ("VLLM_MLX_DEFAULT_CHAT_TEMPLATE_KWARGS", '{"a": 1}', "sampling.default_chat_template_kwargs", {"a": 1}),
    ("VLLM_MLX_TIMEOUT", "12.5", "limits.timeout_s", 12.5),
    ("VLLM_MLX_MODEL", "some/model", "model.model", "some/model"),
])
def test_environment_values_have_the_type_of_their_field(variable, text, path, value):
    group, name = path.split(".")
    settings = parse(**{variable: text})
    assert getattr(getattr(settings, group), name) == value
    assert path in settings.given


def test_a_misspelt_environment_name_is_noted_with_the_nearest():
    _, notes = resolve(VLLM_MLX_PROT="9000")
    assert "VLLM_MLX_PROT is no setting" in notes
    assert "VLLM_MLX_PORT" in notes


def test_repeated_flags_add_up():
    assert parse("--media-root", "/a", "--media-root", "/b").media.media_root == ("/a", "/b")


@pytest.mark.parametrize(("words", "sentence"), [
    (["--port", "70000"], "--port must be at most 65535"),
    (["--port", "x"], "--port takes a whole number, not 'x'"),
    (["--default-top-p", "0"], "--default-top-p must be greater than 0"),
    (["--default-temperature", "nan"], "--default-temperature must be a finite number"),
    (["--timeout", "0"], "--timeout must be greater than 0"),
    (["--dtype", "int8"], "--dtype must be one of auto, float32"),
    (["--kv-bits", "5"], "--kv-bits must be one of 8, 4"),
    (["--memory-warn-threshold", "90"], "--memory-limit-threshold (85) must be greater"),
    (["--runtime-mode", "simple", "--continuous-batching"], "contradict each other"),
    (["--mllm", "--no-mllm"], "--mllm and --no-mllm contradict each other"),
    (["--max-thinking-tokens", "5", "--reasoning-parser", "none"], "needs a reasoning parser"),
    (["--max-tokens", "100", "--max-request-tokens", "50"], "--max-tokens (100) must not be greater"),
    (["--ssl-keyfile", "k.pem"], "--ssl-keyfile needs --ssl-certfile"),
    (["--model-alias", "small"], "--model-alias takes NAME=TARGET"),
    (["--api-key", " "], "--api-key must not be empty"),
    (["--default-chat-template-kwargs", "[1]"], "takes a JSON object"),
    (["--batch-divergence-threshold", "1.5"], "must be at most 1"),
])
def test_what_cannot_be_met_is_one_sentence(words, sentence):
    with pytest.raises(SettingsError) as caught:
        parse(*words).resolve()
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_deterministic_forces_one_greedy_row_and_says_what_it_overrides():
    settings, notes = resolve("--deterministic", "--max-num-seqs", "8", "--default-temperature", "0.7")
    assert settings.batch.max_num_seqs == 1
    assert settings.batch.runtime_mode == "simple"
    assert settings.sampling.default_temperature == 0.0
    assert "--deterministic overrides --max-num-seqs 8, --default-temperature." in notes


def test_runtime_modes_are_row_limits():
    assert resolve("--runtime-mode", "simple")[0].batch.max_num_seqs == 1
    assert resolve("--runtime-mode", "batched")[0].batch.max_num_seqs == 256
    settings, _ = resolve("--continuous-batching", "--max-num-seqs", "16")
    assert (settings.batch.runtime_mode, settings.batch.max_num_seqs) == ("batched", 16)


def test_limits_are_bounded_by_the_context():
    assert resolve()[0].limits.max_tokens == 8192
    settings, notes = resolve("--effective-context-tokens", "100000")
    assert settings.limits.effective_context_tokens == 8192
    assert "more than the model's 8192" in notes
    assert resolve("--effective-context-tokens", "1000")[0].limits.max_tokens == 1000
    assert resolve("--max-request-tokens", "50")[0].limits.max_tokens == 50


def test_resolving_twice_changes_nothing_more():
    for words in ([], ["--deterministic"], ["--localhost", "--host", "0.0.0.0"], ["--effective-context-tokens", "9"]):
        once, _ = resolve(*words)
        assert once.resolve(Facts())[0] == once


def test_public_addresses_are_warned_about_until_they_are_protected():
    _, notes = resolve("--host", "0.0.0.0")
    assert "Anyone who can reach 0.0.0.0:8000" in notes
    assert "rate limit" in notes
    _, notes = resolve("--host", "0.0.0.0", "--rate-limit", "60", VLLM_MLX_API_KEY="k")
    assert "Anyone" not in notes
    assert "rate limit" not in notes
    settings, notes = resolve("--host", "0.0.0.0", "--localhost")
    assert settings.server.host == "127.0.0.1"
    assert "--localhost overrides --host 0.0.0.0." in notes


@pytest.mark.parametrize(("host", "expected"), [
    ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("[::1]", True), ("localhost", True),
    ("0.0.0.0", False), ("::", False), ("192.168.1.2", False), ("example.org", False)])
def test_loopback_addresses(host, expected):
    assert is_loopback(host) is expected


@pytest.mark.parametrize("flag", sorted(LEGACY))
def test_older_names_without_effect_are_accepted_and_noted_once(flag):
    _, notes = resolve(flag, *(["8"] if LEGACY[flag].takes_value else []))
    assert notes.count(f"{flag} makes no difference here") == 1


def test_older_names_with_an_effect_set_their_field():
    assert resolve("--chunked-prefill-tokens", "1024")[0].batch.max_batch_tokens == 1024
    assert resolve("--chunked-prefill-tokens", "0")[0].batch.max_batch_tokens == 2048
    assert resolve("--kv-cache-quantization")[0].cache.kv_bits == 8
    assert resolve("--kv-cache-quantization", "--kv-cache-quantization-bits", "4")[0].cache.kv_bits == 4
    assert resolve("--kv-cache-quantization-bits", "4")[0].cache.kv_bits is None
    assert resolve("--disable-mllm-vision-cache")[0].media.encoder_cache_mb == 0
    assert all(flag in known_flags() for flag in OLDER_NAMES)


def test_flags_that_can_have_no_effect_say_so():
    assert "need --batch-divergence-monitor" in resolve("--batch-divergence-action", "serialize")[1]
    assert "nothing to compare" in resolve("--batch-divergence-monitor", "--runtime-mode", "simple")[1]
    assert "one prefix cache, and it is off" in resolve("--cache-strategy", "paged", "--disable-prefix-cache")[1]
    assert "so its size makes no difference" in resolve("--disable-prefix-cache", "--cache-memory-mb", "9")[1]


def test_secrets_are_in_no_note():
    _, notes = resolve("--host", "0.0.0.0", "--api-key", "hunter2")
    assert "hunter2" not in notes


def test_every_setting_is_read_by_the_program():
    """A flag that nothing reads would be a promise that nothing keeps."""
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name not in ("settings.py", "options.py")]
    by_prefix = {item.path for item in setting_fields() if item.name.startswith("default_")}  # defaults.py joins names
    by_resolve = {"server.localhost", "batch.continuous_batching", "cache.cache_strategy"}
    unread = [item.path for item in setting_fields() if item.path not in by_prefix | by_resolve
              and not any(re.search(rf"\.{item.name}\b", source) for source in sources)]
    assert not unread
    assert any('f"default_{name}"' in source for source in sources)
