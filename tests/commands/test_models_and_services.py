"""Claims about `models`, `service`, `completion` and the live line of `serve`."""

from __future__ import annotations

import io
import logging
import plistlib
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.api.fakes import make_context
from vllm_mlx.api.context import Phase
from vllm_mlx.cli import build_parser, main
from vllm_mlx.commands import models, service
from vllm_mlx.commands.completion import script, words_of
from vllm_mlx.commands.status_line import CLEAR, StatusLine
from vllm_mlx.engine.step import EngineStatus
from vllm_mlx.models.download import DEMO_FOLDER

COMMAND = ["/opt/my env/bin/python", "-m", "vllm_mlx.cli", "serve", "org/model", "--api-key", "50%$x"]


def cached(folder: Path, name: str, *, without: str = "") -> None:
    """The demo model as the hub's cache holds it."""
    snapshot = folder / f"models--{name.replace('/', '--')}" / "snapshots" / "abc"
    shutil.copytree(DEMO_FOLDER, snapshot)
    if without:
        (snapshot / without).unlink()
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")


def test_local_models_are_listed_with_kind_size_and_whether_they_fit(tmp_path):
    cached(tmp_path, "org/whole")
    cached(tmp_path, "org/broken", without="tokenizer.json")
    cached(tmp_path, "org/unfinished", without="model.safetensors")
    found = {model.name: model for model in models.list_models(1 << 40, tmp_path)}
    assert "org/unfinished" not in found and {"demo", "org/whole"} <= set(found)
    whole = found["org/whole"]
    assert (whole.kind, whole.precision, whole.fits) == ("text + image + video", "8-bit", "yes")
    assert whole.disk_bytes > whole.weights_bytes > 1 << 20


@pytest.mark.parametrize(("usable", "fits"), [(1 << 40, "yes"), (30 << 20, "tight"), (1 << 20, "no")])
def test_fitting_is_decided_by_the_weights(tmp_path, usable, fits):
    assert models.list_models(usable, tmp_path)[0].fits == fits


def noted(home: Path, platform: str):
    ran: list[tuple[str, ...]] = []
    return service.for_platform(platform, home, lambda command: ran.append(tuple(command)) or 0), ran


def test_a_systemd_unit_is_written_started_and_taken_away(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    manager, ran = noted(tmp_path, "linux")
    path = manager.install(COMMAND)
    assert path == tmp_path / ".config/systemd/user/vllm-mlx.service" and path.stat().st_mode & 0o077 == 0
    line = next(line for line in path.read_text().splitlines() if line.startswith("ExecStart="))
    restored = [word.replace("%%", "%").replace("$$", "$") for word in shlex.split(line.removeprefix("ExecStart="))]
    assert restored == COMMAND
    assert ran == [("systemctl", "--user", "daemon-reload"), ("systemctl", "--user", "enable", "--now", "vllm-mlx")]
    manager.install(COMMAND)  # again: what runs is stopped first
    assert ("systemctl", "--user", "disable", "--now", "vllm-mlx") in ran
    manager.uninstall()
    assert not path.exists() and ran[-1] == ("systemctl", "--user", "daemon-reload")


def test_a_launch_agent_is_written_started_and_taken_away(tmp_path):
    manager, ran = noted(tmp_path, "darwin")
    path = manager.install(COMMAND)
    content = plistlib.loads(path.read_bytes())
    assert content["ProgramArguments"] == COMMAND and content["RunAtLoad"] is True
    assert ran[-1][:2] == ("launchctl", "bootstrap")
    manager.uninstall()
    assert not path.exists() and ran[-1][:2] == ("launchctl", "bootout")


def test_a_service_that_is_not_there_or_cannot_start_is_one_sentence(tmp_path):
    manager, _ = noted(tmp_path, "linux")
    with pytest.raises(service.ServiceError, match="no such service"):
        manager.stop()
    failing = service.for_platform("linux", tmp_path, lambda command: 1)
    with pytest.raises(service.ServiceError, match="daemon-reload` failed"):
        failing.install(COMMAND)
    with pytest.raises(service.ServiceError, match="macOS and Linux only"):
        service.for_platform("win32", tmp_path, lambda command: 0)


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_where_services_cannot_be_started_nothing_is_left(tmp_path, monkeypatch, platform):
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    fine, _ = noted(tmp_path, platform)
    broken = service.for_platform(platform, tmp_path, lambda command: 1)
    with pytest.raises(service.ServiceError, match="Nothing was installed"):
        broken.install(COMMAND)
    assert not broken.path.exists()
    fine.install(COMMAND)
    with pytest.raises(service.ServiceError):
        broken.install(COMMAND)
    assert broken.path.exists()  # it was there before
    broken.uninstall()
    assert not broken.path.exists()


def test_install_passes_serve_s_flags_on():
    parsed = build_parser().parse_args(["service", "install", "org/model", "--port", "9000"])
    assert parsed.arguments == ["org/model", "--port", "9000"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_command_and_flag_and_the_shell_can_read_it(shell, capsys):
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("serve", "chat", "temperature", "kv-bits", "uninstall"))
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=30)


def test_bash_completes_a_flag():
    if not shutil.which("bash"):
        pytest.skip("bash is not installed")
    ask = "COMP_WORDS=(vllm-mlx serve --kv-b); COMP_CWORD=2; _vllm_mlx; echo ${COMPREPLY[@]}"
    code = script("bash", words_of(build_parser())) + ask
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["--kv-bits"]


def test_the_live_line_tells_speeds_and_stays_under_the_log():
    statuses = [EngineStatus(num_running=2, num_completion_tokens=100, num_prompt_tokens=50, num_cached_tokens=25),
                EngineStatus(num_running=2, num_completion_tokens=160, num_prompt_tokens=50, num_cached_tokens=25)]
    context = make_context(read_status=lambda: statuses.pop(0))
    out = io.StringIO()
    line = StatusLine(context, out)
    line.text(10.0)
    text = line.text(12.0)
    assert "2 running · 0 waiting · 30 tokens/s · 0 prompt tokens/s · 50 % from cache" in text
    handler = logging.StreamHandler(out)
    line.attach(handler)
    line.show("status")
    handler.emit(logging.makeLogRecord({"msg": "something happened"}))
    assert out.getvalue().endswith(f"{CLEAR}something happened\n{CLEAR}\x1b[2mstatus\x1b[0m")


def test_the_live_line_says_what_loads_and_is_for_terminals_only():
    context = make_context(phase=Phase.LOADING)
    assert StatusLine(context, io.StringIO()).text(0).startswith("loading demo · ")
    assert not StatusLine.is_wanted(io.StringIO(), "text")
