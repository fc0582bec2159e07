"""The file of --mcp-config: both ways to write it, what may not be in it, and what is never shown of it."""

from __future__ import annotations

import json

import pytest

from vllm_mlx.errors import SettingsError
from vllm_mlx.mcp_client.config import read_config


def read(tmp_path, content, environ=None):
    file = tmp_path / "mcp.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_config(str(file), environ or {})


def test_both_keys_and_both_languages_are_read(tmp_path):
    entry = {"command": "npx", "args": ["-y", "server", 3], "env": {"A": "b"}, "timeout": 5, "tools": ["read_*"]}
    for key in ("servers", "mcpServers"):
        (server,) = read(tmp_path, {key: {"files": entry}})
        assert (server.name, server.command, server.args) == ("files", "npx", ("-y", "server", "3"))
        assert server.env == {"A": "b"} and server.timeout_s == 5 and server.transport == "stdio"
        assert server.allows("read_file") and not server.allows("write_file")
    web = "{type: http, url: https://example.com/mcp, headers: {Authorization: Bearer x}}"
    (server,) = read(tmp_path, f"mcpServers:\n  web: {web}\n")
    assert server.transport == "streamable-http" and server.headers == {"Authorization": "Bearer x"}
    assert server.allows("anything")
    both = {"servers": {"a": {"command": "x"}}, "mcpServers": {"b": {"command": "y"}}}
    assert [s.name for s in read(tmp_path, both)] == ["a", "b"]


def test_servers_can_be_switched_off(tmp_path):
    off = {"a": {"command": "x", "enabled": False}, "b": {"command": "x", "disabled": True}, "c": {"command": "x"}}
    assert [s.name for s in read(tmp_path, {"servers": off})] == ["c"]


def test_secrets_come_from_the_environment_and_are_concealed(tmp_path):
    entry = {"url": "https://user:passw0rd@host/mcp?token=abcdef", "headers": {"Authorization": "Bearer ${MY_TOKEN}"}}
    (server,) = read(tmp_path, {"servers": {"a": entry}}, {"MY_TOKEN": "s3cr3t-value"})
    assert server.headers["Authorization"] == "Bearer s3cr3t-value"
    told = server.conceal("refused: Bearer s3cr3t-value, s3cr3t-value at https://user:passw0rd@host/mcp?token=abcdef")
    assert "s3cr3t" not in told and "passw0rd" not in told and "abcdef" not in told and told.startswith("refused: ***")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "neither JSON nor YAML"),
        ("[]", "must hold an object"),
        ({"server": {}}, "neither `servers` nor `mcpServers`"),
        ({"servers": []}, "must map names"),
        ({"servers": {"a b": {"command": "x"}}}, "letters, digits"),
        ({"servers": {"a": []}}, "must be an object"),
        ({"servers": {"a": {"comand": "x"}}}, "did you mean 'command'"),
        ({"servers": {"a": {}}}, "either `command`"),
        ({"servers": {"a": {"command": "x", "url": "http://y"}}}, "either `command`"),
        ({"servers": {"a": {"command": "npx -y server"}}}, "its arguments go into `args`"),
        ({"servers": {"a": {"command": ["x"]}}}, "must be text"),
        ({"servers": {"a": {"command": "x", "args": "y z"}}}, "`args` must be a list"),
        ({"servers": {"a": {"command": "x", "env": {"A": None}}}}, "`env.A` must be text"),
        ({"servers": {"a": {"command": "x", "env": {"A": "${NOT_THERE}"}}}}, "${NOT_THERE}"),
        ({"servers": {"a": {"command": "x", "timeout": 0}}}, "above 0"),
        ({"servers": {"a": {"url": "file:///etc/passwd"}}}, "http or https"),
        ({"servers": {"a": {"url": "http://x", "transport": "sse"}}}, "streamable-http too"),
        ({"servers": {"a": {"url": "http://x", "transport": "stdio"}}}, "does not go with"),
        ({"servers": {"a": {"command": "x"}}, "mcpServers": {"a": {"command": "x"}}}, "twice"),
    ],
)
def test_a_wrong_file_is_one_sentence_that_names_the_place(tmp_path, content, told):
    with pytest.raises(SettingsError) as caught:
        read(tmp_path, content)
    assert told in str(caught.value) and "mcp.json" in str(caught.value)


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(SettingsError, match="cannot be read"):
        read_config(str(tmp_path / "nothing.json"), {})
