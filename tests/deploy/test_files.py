"""The files of deploy/: what they name exists, and they agree with the settings. No image is built here."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

from vllm_mlx.cli import build_parser
from vllm_mlx.options import env_name
from vllm_mlx.settings import Settings, setting_fields

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "systemd/vllm-mlx@.service"
CONTAINERFILE = DEPLOY / "container/Containerfile"
VARIABLES = {env_name(item) for item in setting_fields()}


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest), continued lines joined."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def test_the_container_copies_what_is_there_and_let_through() -> None:
    ignored = (CONTAINERFILE.parent / "Containerfile.dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in ignored if line.startswith("!")]
    assert ignored[0] == "*"
    copied = [word for name, rest in instructions() if name == "COPY" and "--from" not in rest
              for word in shlex.split(rest)[:-1]]  # fmt: skip
    assert {"vllm_mlx", "pyproject.toml", "constraints.txt"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists() and any(fnmatch(source, pattern) for pattern in allowed), source


def test_the_container_installs_what_there_is_and_sets_what_is_known() -> None:
    found = instructions()
    assert [name for name, _ in found if name == "FROM"] and found[-1] == ("CMD", '["serve"]')
    assert {name for name, _ in found} <= {
        "ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK",
        "ENTRYPOINT", "CMD",
    }  # fmt: skip
    text = CONTAINERFILE.read_text()
    extras = re.search(r'"\.\[([\w,]+)\]"', text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(re.search(rf"^{extra} = ", project, re.M) for extra in extras[1].split(","))
    assert set(re.findall(r"VLLM_MLX_\w+", text)) <= VARIABLES
    assert f"EXPOSE {Settings().server.port}" in text and f":{Settings().server.port}/health/live" in text
    # Root would be needed for nothing.
    assert [rest for name, rest in found if name == "USER"] == ["vllm-mlx"]


def test_the_unit_gives_a_drain_the_time_it_may_take_and_starts_a_command_that_exists() -> None:
    unit = dict(line.split("=", 1) for line in UNIT.read_text().splitlines() if re.match(r"\w+=", line))
    assert unit["KillSignal"] == "SIGTERM" and float(unit["TimeoutStopSec"]) > Settings().server.shutdown_timeout + 8
    build_parser().parse_args(shlex.split(unit["ExecStart"].replace("%i", "8001"))[1:])
    assert set(re.findall(r"VLLM_MLX_\w+", UNIT.read_text())) <= VARIABLES


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_nothing_wrong_with_the_unit(tmp_path: Path) -> None:
    unit = tmp_path / "vllm-mlx@8001.service"
    unit.write_text(re.sub(r"(?<=^ExecStart=)\S+", "/bin/true", UNIT.read_text(), flags=re.M)
                    .replace("/usr/bin/curl", "/bin/true"))  # fmt: skip
    found = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, timeout=60)
    assert found.returncode == 0 and not found.stderr.strip(), found.stderr


def test_litellm_and_nginx_name_the_same_replicas() -> None:
    config = yaml.safe_load((DEPLOY / "litellm/config.yaml").read_text())
    places = [model["litellm_params"]["api_base"] for model in config["model_list"]]
    assert places == ["http://127.0.0.1:8001/v1", "http://127.0.0.1:8002/v1"]
    assert len({model["model_info"]["id"] for model in config["model_list"]}) == 2
    assert re.findall(r"server (127\.0\.0\.1:\d+)", (DEPLOY / "nginx/vllm-mlx.conf").read_text()) == [
        "127.0.0.1:8001", "127.0.0.1:8002",
    ]  # fmt: skip
