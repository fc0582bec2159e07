"""The launcher scripts: what they would start parses and is what the operator guide says."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from vllm_mlx.cli import build_parser
from vllm_mlx.options import settings_from
from vllm_mlx.settings import Settings

SCRIPTS = Path(__file__).parents[1] / "scripts"


@pytest.fixture
def start(tmp_path):
    """Run a script with an interpreter that only writes down its arguments and key."""
    interpreter = tmp_path / "python"
    interpreter.write_text('#!/bin/sh\nprintf "%s\\n" "$VLLM_MLX_API_KEY" "$@" > "$ARGUMENTS"\n')
    interpreter.chmod(0o755)

    def run(script: str, *words: str, **environ: str) -> Settings:
        written = tmp_path / "arguments"
        subprocess.run([SCRIPTS / script, *words], check=True, capture_output=True, timeout=30, env={
            "PATH": os.environ["PATH"], "VLLM_MLX_PYTHON": str(interpreter), "ARGUMENTS": str(written), **environ})
        key, *arguments = written.read_text().splitlines()
        assert arguments[:3] == ["-m", "vllm_mlx.cli", "serve"]
        parsed = build_parser().parse_args(arguments[2:])
        return settings_from({name: value for name, value in vars(parsed).items() if name != "command"},
                             {"VLLM_MLX_API_KEY": key})

    return run


@pytest.mark.parametrize(("letter", "name"), [
    ("A", "text-default"), ("B", "text-deterministic"), ("C", "text-tools"), ("D", "mllm-default"),
    ("E", "mllm-correctness"), ("F", "text-json")])
def test_profiles_have_a_letter_and_a_name_and_settings_that_resolve(start, letter, name):
    settings = start("serve_profile.sh", name, "some/model")
    assert start("serve_profile.sh", letter, "some/model") == settings
    settings.resolve()
    assert settings.model.model == "some/model"
    assert settings.server.localhost


def test_profiles_mean_what_the_guide_says(start):
    assert start("serve_profile.sh", "B", "m").sampling.deterministic
    assert start("serve_profile.sh", "F", "m").limits.timeout_s == 900
    correctness = start("serve_profile.sh", "E", "m")
    assert correctness.model.mllm
    assert correctness.guards.batch_divergence_action == "serialize"


def test_flags_of_the_caller_win_and_the_environment_says_where_to_listen(start):
    settings = start("serve_profile.sh", "A", "m", "--default-temperature", "0.1", PORT="8123", LISTEN_MODE="public")
    assert settings.sampling.default_temperature == 0.1
    assert (settings.server.host, settings.server.port, settings.server.localhost) == ("0.0.0.0", 8123, False)


@pytest.mark.parametrize("client", [
    "semachat", "semachat-mllm", "open-webui-text", "open-webui-mllm", "goose-text", "goose-tools", "cherry-studio",
    "chatbox", "librechat", "witsy", "jan", "anythingllm", "boltai", "generic-openai", "generic-mllm"])
def test_clients_get_a_key_of_their_own_unless_one_is_given(start, client):
    assert start("serve_client_profile.sh", client, "m").server.api_key.endswith(("-local", "-client"))
    assert start("serve_client_profile.sh", client, "m", VLLM_MLX_CLIENT_API_KEY="mine").server.api_key == "mine"
    assert start("serve_client_profile.sh", client, "m", "--api-key", "given").server.api_key == "given"


@pytest.mark.parametrize(("script", "words"), [
    ("serve_profile.sh", ["A"]), ("serve_profile.sh", ["Z", "m"]), ("serve_client_profile.sh", ["nobody", "m"])])
def test_a_wrong_call_shows_the_usage(script, words):
    result = subprocess.run([SCRIPTS / script, *words], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 1
    assert "usage:" in result.stderr
