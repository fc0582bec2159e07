"""The command line as a person meets it: real processes, exit codes, one-line causes, a light `--help`."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from vllm_mlx import __version__, cli

HEAVY = ("mlx", "mlx_lm", "mlx_vlm", "transformers", "fastapi", "uvicorn", "numpy", "pydantic", "rich")


def run(*words: str, module: str = "vllm_mlx.cli", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", module, *words], capture_output=True, text=True, check=False,
                          timeout=60, env={**os.environ, **environ})


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["serve", "--help"], ["download", "--help"]])
def test_help_and_version_import_no_library(words):
    code = (f"import sys; from vllm_mlx.cli import main\n"
            f"try: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
            f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)")
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stderr.strip() == "[]"
    assert result.stdout.strip()


def test_version_is_the_package_s():
    assert run("--version").stdout.strip() == f"vllm-mlx {__version__}"
    assert run("--version", module="vllm_mlx").stdout.strip() == f"vllm-mlx {__version__}"


@pytest.mark.parametrize(("words", "sentence"), [
    (["serve", "--strict-model"], "unknown flag --strict-model; did you mean --strict-model-id?"),
    (["serve", "--enable-thinking"], "there is no --enable-thinking flag: thinking is a request field"),
    (["download", "a", "b"], "unexpected argument 'b'"),
    (["serve", "--port"], "--port"),
    (["serve", "--memory-limit-threshold", "10"], "must be greater than --memory-warn-threshold"),
    (["download", "--retires", "3"], "did you mean --retries?"),
    (["sevre"], "sevre"),
])
def test_wrong_command_lines_are_one_sentence_and_exit_2(words, sentence):
    result = run(*words)
    assert result.returncode == 2
    assert sentence in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_a_wrong_environment_value_names_the_variable():
    result = run("serve", VLLM_MLX_PORT="eighty")
    assert (result.returncode, result.stderr) == (2, "vllm-mlx: VLLM_MLX_PORT takes a whole number, not 'eighty'.\n")


def test_no_arguments_show_the_help():
    result = run()
    assert result.returncode == 2
    assert "serve a model over HTTP" in result.stderr


def test_a_model_that_cannot_be_had_is_one_line_and_exit_1(tmp_path):
    result = run("download", str(tmp_path / "nothing-here"))
    assert result.returncode == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert "nothing-here" in result.stderr


def test_interrupt_is_exit_130(monkeypatch):
    def interrupted(settings):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.HANDLERS, "doctor", interrupted)
    assert cli.main(["doctor"]) == 130


def test_commands_receive_their_settings(monkeypatch):
    seen = []
    monkeypatch.setitem(cli.HANDLERS, "download", lambda settings: seen.append(settings) or 0)
    assert cli.main(["download", "a/b", "--timeout", "9", "--retries", "1", "--offline", "--revision", "v1"]) == 0
    model = seen[0].model
    assert (model.model, model.download_timeout, model.download_retries) == ("a/b", 9.0, 1)
    assert (model.offline, model.revision) == (True, "v1")
