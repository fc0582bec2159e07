"""The command line: parses into Settings and hands over; holds no logic of its own.

Nothing heavy is imported at the top, so that `--help` and `--version` answer at once; each command imports its own.
Exit codes: 0 done, 1 it failed (a model, the network), 2 the command line was wrong, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from vllm_mlx import __version__
from vllm_mlx.commands.completion import script, words_of
from vllm_mlx.commands.words import add_commands
from vllm_mlx.errors import SettingsError, VllmMlxError
from vllm_mlx.options import (
    LISTEN_FD,
    SentenceParser,
    UsageError,
    add_settings,
    explain_unknown,
    known_flags,
    settings_from,
)
from vllm_mlx.settings import Settings

DOWNLOAD_FIELDS = frozenset({
    "model.model", "model.revision", "model.mllm", "model.offline", "model.download_timeout", "model.download_retries"})
DOWNLOAD_FLAGS = ("--revision", "--mllm", "--no-mllm", "--offline", "--timeout", "--retries", "--download-timeout",
                  "--download-retries", "--help")


TUNE_FIELDS = frozenset({
    "model.model", "model.revision", "model.mllm", "model.dtype", "model.trust_remote_code", "model.offline",
    "cache.kv_bits", "cache.kv_group_size", "batch.batch_invariant",
    "cpu.blas", "cpu.blas_threads", "cpu.few_row_kernels"})


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except (UsageError, SettingsError) as error:
        print(f"vllm-mlx: {error}", file=sys.stderr)
        return 2
    except VllmMlxError as error:
        print(f"vllm-mlx: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        if (error.name or "").startswith("vllm_mlx"):
            raise  # a mistake of ours, which needs its traceback
        print(f"vllm-mlx: a library cannot be imported: {error}; `vllm-mlx doctor` says what is here.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left (`vllm-mlx --help | head`); what is still buffered must not raise at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _run(arguments: list[str]) -> int:
    parser = build_parser()
    if not arguments:
        parser.print_help(sys.stderr)
        return 2
    if arguments[0] == "bench":
        # The benchmark has a command line of its own; it is imported here because it brings numpy and httpx.
        from vllm_mlx.bench.main import run as run_bench
        return run_bench(arguments[1:])
    if arguments[0] in ("connect", "launch"):
        from vllm_mlx.connect.main import run as run_connect
        return run_connect(arguments[0], arguments[1:])
    parsed, unknown = parser.parse_known_args(arguments)
    if unknown:
        known = known_flags() if parsed.command == "serve" else DOWNLOAD_FLAGS
        if parsed.command in COMMANDS or parsed.command == "tune":
            known = words_of(parser)[parsed.command]
        raise UsageError(explain_unknown(unknown, known))
    if parsed.command is None:
        raise UsageError("no command; try `vllm-mlx serve` or `vllm-mlx --help`.")
    if parsed.command == "cache":
        from vllm_mlx.disk_cache import run as run_cache  # imports numpy
        return run_cache(parsed.action, parsed.folder, parsed.model)
    if parsed.command in COMMANDS:
        return COMMANDS[parsed.command](parsed)
    values = {name: value for name, value in vars(parsed).items() if name not in ("command", "rounds")}
    settings = settings_from(values, os.environ)
    if parsed.command == "serve" and settings.server.engine_process and LISTEN_FD not in os.environ:
        return _supervise(settings, arguments)
    if parsed.command == "tune":
        from vllm_mlx.tune.main import run as run_tune  # imports rich, and MLX once it measures
        return run_tune(settings, parsed.rounds)
    return HANDLERS[parsed.command](settings)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line, except that of `bench`."""
    parser = SentenceParser(
        prog="vllm-mlx", allow_abbrev=False,
        description="An OpenAI- and Anthropic-compatible server for language and vision-language models on MLX.")
    parser.add_argument("--version", action="version", version=f"vllm-mlx {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=SentenceParser)
    serve = commands.add_parser(
        "serve", allow_abbrev=False, help="serve a model over HTTP", usage="vllm-mlx serve [MODEL ...] [flags]",
        description="Serve MODEL (a folder, a hub id, or nothing for the built-in demo model) over HTTP, or several.",
        epilog="Each setting can also come from the environment variable in brackets; a flag wins.")
    add_settings(serve)
    download = commands.add_parser(
        "download", allow_abbrev=False, help="fetch a model from the hub into the local cache",
        description="Fetch MODEL into the local cache, so that `serve` starts without the network.")
    add_settings(download, DOWNLOAD_FIELDS)
    download.add_argument("--timeout", dest="model.download_timeout", metavar="S", default=argparse.SUPPRESS,
                          help="The same as --download-timeout.")
    download.add_argument("--retries", dest="model.download_retries", metavar="N", default=argparse.SUPPRESS,
                          help="The same as --download-retries.")
    doctor = commands.add_parser(
        "doctor", allow_abbrev=False, help="say what is installed, and whether it works",
        description="Say which program, interpreter and libraries this is, and try them for a few seconds.")
    add_settings(doctor, frozenset({"cpu.blas", "cpu.blas_threads", "cpu.few_row_kernels"}))
    tune = commands.add_parser(
        "tune", allow_abbrev=False, help="find the best settings for a model on this machine",
        description="Measure chunk size, row limit and guessing ahead for MODEL on this machine, and keep what is "
                    "better than the defaults: `serve` uses it from then on. Takes minutes; nothing else should run.")
    add_settings(tune, TUNE_FIELDS)
    tune.add_argument("--rounds", dest="rounds", default="3", metavar="N",
                      help="How often each candidate is measured. Default: 3.")
    commands.add_parser("connect", add_help=False, help="show or write a client's settings for the running server")
    commands.add_parser("launch", add_help=False, help="start a client with the settings for the running server")
    cache = commands.add_parser(
        "cache", allow_abbrev=False, help="look at, check or empty a disk cache",
        description="Look at, check or empty the folder of --disk-cache. No server may be using it.")
    cache.add_argument("action", choices=("ls", "clear", "verify"), help="List by model, drop blocks, or check all.")
    cache.add_argument("folder", metavar="DIR", help="The folder that --disk-cache named.")
    cache.add_argument("--model", metavar="TEXT", default=None, help="Only models whose name contains TEXT.")
    add_commands(commands)
    commands.add_parser("bench", add_help=False, help="measure this server, or any other (`vllm-mlx bench --help`)")
    return parser


def _supervise(settings: Settings, arguments: list[str]) -> int:
    settings.resolve()
    from vllm_mlx.supervisor.run import supervise  # imports uvicorn, but no MLX: that is the point of it
    return supervise(settings, arguments)


def _serve(settings: Settings) -> int:
    settings.resolve()  # contradictions are said before anything heavy is imported or loaded
    from vllm_mlx.app import serve  # imports FastAPI and MLX
    return serve(settings)


def _download(settings: Settings) -> int:
    settings.resolve()
    from vllm_mlx.models import download  # imports huggingface_hub and rich when the hub is asked

    model = settings.model
    if model.mllm is not None:
        print("vllm-mlx: --mllm makes no difference to a download: all files are fetched.", file=sys.stderr)
    folder = download.resolve(
        model.model, offline=model.offline, revision=model.revision, timeout_s=model.download_timeout,
        retries=model.download_retries, progress=download.Bar(model.model))
    print(f"Model ready at: {folder}")
    return 0


def _doctor(settings: Settings) -> int:
    settings.resolve()
    from vllm_mlx.doctor import run  # imports MLX after loading a BLAS
    return run(settings.cpu)


def _run_prompt(parsed: argparse.Namespace) -> int:
    from vllm_mlx.commands.run import run  # imports httpx
    return run(parsed)


def _chat(parsed: argparse.Namespace) -> int:
    from vllm_mlx.commands.chat import run  # imports httpx and rich
    return run(parsed)


def _record(parsed: argparse.Namespace) -> int:
    from vllm_mlx.commands.record import run  # imports httpx and jsonschema
    return run(parsed)


def _models(parsed: argparse.Namespace) -> int:
    from vllm_mlx.commands.models import run  # imports huggingface_hub and rich
    return run(parsed)


def _service(parsed: argparse.Namespace) -> int:
    from vllm_mlx.commands.service import run  # subprocess and plistlib, rarely needed
    return run(parsed)


def _completion(parsed: argparse.Namespace) -> int:
    print(script(parsed.shell, words_of(build_parser())), end="")
    return 0


# Those that need no settings of the server's.
COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run_prompt, "chat": _chat, "record": _record, "models": _models, "service": _service,
    "completion": _completion}
HANDLERS: dict[str, Callable[[Settings], int]] = {"serve": _serve, "download": _download, "doctor": _doctor}

if __name__ == "__main__":
    raise SystemExit(main())
