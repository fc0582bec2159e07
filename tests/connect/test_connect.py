"""`vllm-mlx connect` and `launch`: what is printed, written and left alone, and what a client is started with."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from tests.api.fakes import MODEL_ID, live_server, make_context
from vllm_mlx.api.context import ServedModel
from vllm_mlx.connect import clients, files
from vllm_mlx.connect.clients import CLIENTS
from vllm_mlx.connect.files import Change, merge, write
from vllm_mlx.connect.main import describe, run
from vllm_mlx.connect.server import Server, ask, clean_url
from vllm_mlx.errors import Unavailable, VllmMlxError
from vllm_mlx.options import UsageError
from vllm_mlx.settings import Settings

SERVER = Server("http://127.0.0.1:8000", "org/model", 65536, takes_images=True, takes_any_name=True, key="sk-secret")


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("XDG_CONFIG_HOME", "CLAUDE_CONFIG_DIR", "CODEX_HOME", "VLLM_MLX_API_KEY", "VLLM_MLX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("name", CLIENTS)
def test_a_plan_says_address_model_and_key_and_stays_in_the_home_folder(name, own_home):
    plan = CLIENTS[name](SERVER)
    text = describe(plan)
    assert "127.0.0.1:8000" in text and "org/model" in text
    assert ("sk-secret" in text) or any("sk-secret" in value for value in plan.environment.values())
    for change in plan.changes:
        assert change.path.is_relative_to(own_home)
        assert change.merged()
    without_key = CLIENTS[name](Server("http://h:1", "m"))
    assert "sk-secret" not in describe(without_key)


def test_claude_code_is_told_all_its_model_names_and_no_counters():
    environment = clients.claude_code(SERVER).environment
    assert environment["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:8000"
    assert environment["ANTHROPIC_DEFAULT_SONNET_MODEL"] == "org/model"
    assert environment["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "claude-haiku"
    assert environment["CLAUDE_CODE_TOTAL_TOKENS_REMINDER"] == "off"
    strict = clients.claude_code(Server("http://h:1", "m")).environment
    assert strict["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "m"


def test_codex_speaks_responses_by_file_and_by_command(own_home):
    plan = clients.codex(SERVER)
    provider = tomllib.loads(plan.changes[0].merged())["model_providers"]["vllm-mlx"]
    assert provider == {"name": "vllm-mlx", "base_url": "http://127.0.0.1:8000/v1", "wire_api": "responses",
                        "env_key": "VLLM_MLX_API_KEY"}  # fmt: skip
    overrides = [plan.command[i + 1] for i, word in enumerate(plan.command) if word == "-c"]
    assert tomllib.loads(overrides[0])["model_providers"]["vllm-mlx"] == provider
    assert "env_key" not in clients.codex(Server("http://h:1", "m")).changes[0].merged()


# --- files ---------------------------------------------------------------------------------------------------------


def test_writing_merges_keeps_the_rest_and_leaves_a_backup(own_home):
    path = own_home / ".claude" / "settings.json"
    path.parent.mkdir()
    path.write_text('{"theme": "dark", "env": {"OTHER": "1", "ANTHROPIC_MODEL": "old"}}')
    path.chmod(0o640)
    (change,) = clients.claude_code(SERVER).changes
    backup = write(change)
    after = json.loads(path.read_text())
    assert after["theme"] == "dark" and after["env"]["OTHER"] == "1" and after["env"]["ANTHROPIC_MODEL"] == "org/model"
    assert backup is not None and json.loads(backup.read_text())["env"]["ANTHROPIC_MODEL"] == "old"
    assert path.stat().st_mode & 0o777 == 0o640
    assert write(change) is None and len(list(path.parent.iterdir())) == 2


def test_a_new_file_with_a_key_is_its_owners_alone(own_home):
    (change,) = clients.opencode(SERVER).changes
    assert write(change) is None
    assert change.path.stat().st_mode & 0o077 == 0


def test_a_toml_file_keeps_its_comments_and_our_block_is_replaced(own_home):
    path = own_home / ".codex" / "config.toml"
    path.parent.mkdir()
    path.write_text('# mine\nmodel = "gpt"\n\n[tools]\nx = 1\n')
    write(clients.codex(SERVER).changes[0])
    write(clients.codex(Server("http://other:1", "m")).changes[0])
    text = path.read_text()
    assert text.startswith('# mine\nmodel = "gpt"\n') and text.count(files.BEGIN) == 1
    assert tomllib.loads(text)["model_providers"]["vllm-mlx"]["base_url"] == "http://other:1/v1"


def test_a_table_that_is_there_already_is_not_written_twice(own_home):
    path = own_home / ".codex" / "config.toml"
    path.parent.mkdir()
    path.write_text('[model_providers.vllm-mlx]\nname = "mine"\n')
    with pytest.raises(VllmMlxError, match="would not be valid"):
        write(clients.codex(SERVER).changes[0])
    assert path.read_text() == '[model_providers.vllm-mlx]\nname = "mine"\n'


@pytest.mark.parametrize("text", ['{// comment\n"a": 1}', "{", "[1]"])
def test_a_file_that_cannot_be_read_for_sure_is_left_alone(own_home, text):
    path = own_home / "settings.json"
    path.write_text(text)
    with pytest.raises(VllmMlxError, match=r"settings\.json"):
        write(Change(path, "json", {"b": 2}))
    assert path.read_text() == text and list(own_home.iterdir()) == [path]


def test_lists_of_models_replace_the_one_of_the_same_name(own_home):
    assert merge({"models": [{"name": "a", "v": 1}, {"name": "b"}]}, {"models": [{"name": "a", "v": 2}]}) == {
        "models": [{"name": "b"}, {"name": "a", "v": 2}]
    }
    path = own_home / ".continue" / "config.yaml"
    path.parent.mkdir()
    path.write_text("name: Mine\nversion: 2.0.0\nschema: v1\nmodels:\n- name: other\n  provider: x\n  model: y\n")
    write(clients.continue_dev(SERVER).changes[0])
    after = yaml.safe_load(path.read_text())
    assert after["name"] == "Mine" and [m["name"] for m in after["models"]] == ["other", "vllm-mlx"]


# --- commands ------------------------------------------------------------------------------------------------------


def test_a_server_is_asked_for_its_model_and_context():
    async def go(context, **options):
        async with live_server(context) as address:
            return await asyncio.to_thread(ask, address, **options)

    model = ServedModel(id=MODEL_ID, context_tokens=4096, modalities=frozenset({"text", "image"}))
    found = asyncio.run(go(make_context(model=model)))
    assert (found.model, found.context_tokens, found.takes_images, found.takes_any_name) == (MODEL_ID, 4096, True, True)
    strict = Settings().with_values(server__strict_model_id=True)
    assert not asyncio.run(go(make_context(settings=strict))).takes_any_name
    with pytest.raises(VllmMlxError, match="wants a key"):
        asyncio.run(go(make_context(api_keys={"a": "k"})))
    assert asyncio.run(go(make_context(api_keys={"a": "k"}), key="k")).key == "k"


def test_without_a_server_it_says_what_to_do_unless_the_model_is_named():
    with pytest.raises(Unavailable, match="vllm-mlx serve"):
        ask("http://127.0.0.1:9")
    assert ask("http://127.0.0.1:9", model="m").model == "m"


def test_addresses_are_cleaned():
    assert clean_url("localhost:8000/v1/") == "http://localhost:8000"
    assert clean_url("https://h/prefix") == "https://h/prefix"
    for wrong in ("ftp://h", "http://", ""):
        with pytest.raises(VllmMlxError, match="--url"):
            clean_url(wrong)


def test_connect_prints_and_writes(capsys, own_home):
    where = ["--url", "http://127.0.0.1:9", "--model", "m"]
    assert run("connect", ["opencode", *where]) == 0
    assert "http://127.0.0.1:9/v1" in capsys.readouterr().out and not (own_home / ".config").exists()
    assert run("connect", ["opencode", *where, "--write"]) == 0
    assert "Wrote" in capsys.readouterr().out
    written = json.loads((own_home / ".config" / "opencode" / "opencode.json").read_text())
    assert written["model"] == "vllm-mlx/m"
    with pytest.raises(VllmMlxError, match="no settings file"):
        run("connect", ["semachat", *where, "--write"])
    with pytest.raises(UsageError, match="did you mean codex"):
        run("connect", ["codx", *where])
    with pytest.raises(VllmMlxError, match="cannot be started"):
        run("launch", ["continue", *where])


def test_nothing_is_written_when_one_of_the_files_cannot_be(own_home):
    (own_home / ".aider.model.metadata.json").write_text("{ // comment")
    with pytest.raises(VllmMlxError):
        run("connect", ["aider", "--url", "http://127.0.0.1:9", "--model", "m", "--write"])
    assert not (own_home / ".aider.conf.yml").exists()


def test_launch_becomes_the_client_with_its_settings(own_home, tmp_path):
    program = tmp_path / "bin" / "claude"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$ANTHROPIC_BASE_URL $ANTHROPIC_MODEL $@"\n')
    program.chmod(0o755)
    command = [sys.executable, "-m", "vllm_mlx.cli", "launch", "claude", "--url", "127.0.0.1:9", "--model", "m"]
    environment = {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}"}
    result = subprocess.run([*command, "--", "-p", "hi"], capture_output=True, text=True, env=environment, timeout=60)
    assert result.stdout == "http://127.0.0.1:9 m -p hi\n", result.stderr
    environment["PATH"] = os.defpath
    missing = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert missing.returncode == 1 and "not installed" in missing.stderr
