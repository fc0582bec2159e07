"""The command lines of `run`, `chat`, `record`, `models`, `service`, `completion`. No imports: `--help` is fast."""

from __future__ import annotations

import argparse
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_commands(commands: Any) -> None:
    """Add each to the subparsers of `vllm-mlx`."""
    run = commands.add_parser(
        "run", allow_abbrev=False, help="answer one prompt and exit",
        description="Answer PROMPT and exit. Text piped in is put after it; `-` takes the prompt itself from there.")
    run.add_argument("prompt", metavar="PROMPT", nargs="?", help="What to ask; without it, standard input.")
    _add_talk(run)
    run.add_argument("--image", action="append", default=[], metavar="FILE", help="A picture: file or URL; repeatable.")
    run.add_argument("--json-schema", metavar="FILE", help="Answer with JSON that fits this schema (a file).")
    run.add_argument("--stats", action="store_true", help="Show tokens, speed and cached share, on standard error.")

    chat = commands.add_parser(
        "chat", allow_abbrev=False, help="talk to a model in the terminal",
        description="Talk to a model. /help lists what can be typed besides messages.")
    chat.add_argument("model", metavar="MODEL", nargs="?", help="Load this model here instead of asking a server.")
    _add_talk(chat, has_model=False)

    record = commands.add_parser(
        "record", allow_abbrev=False, help="measure a running server and write down what a report must say",
        description="Send chat payloads to a running server; write model and revision, serve command, interpreter, "
                    "installation, payloads, latency, token counts, reasoning leaks and format faults, as JSON and "
                    "Markdown.")
    record.add_argument("out", metavar="NAME", help="NAME.json and NAME.md are written.")
    record.add_argument("--payload", action="append", default=[], metavar="FILE",
                        help="A chat request as JSON; repeatable. Without it, the operator guide's smoke tests.")
    record.add_argument("--repeat", type=_positive, default=1, metavar="N", help="How often each payload is sent.")
    record.add_argument("--client", default="vllm-mlx record", metavar="TEXT", help="The client it is reported for.")
    record.add_argument("--server", metavar="URL", help="Ask this server. Default: http://127.0.0.1:8000.")
    record.add_argument("--api-key", metavar="KEY", help="Its API key [VLLM_MLX_CLIENT_API_KEY].")
    record.add_argument("--timeout", type=float, default=300.0, metavar="S", help="Seconds without a byte.")

    models = commands.add_parser(
        "models", allow_abbrev=False, help="list the models that are on this machine",
        description="List the built-in model and those in the hub's cache: kind, size, precision, whether they fit.")
    models.add_argument("--json", action="store_true", help="For programs.")

    service = commands.add_parser(
        "service", allow_abbrev=False, help="run the server in the background, and at login",
        usage="vllm-mlx service install [serve's arguments] | start | stop | status | logs | uninstall",
        description="Keep `vllm-mlx serve` running, by launchd (macOS) or a systemd user unit (Linux). One plain file "
                    "is written; `uninstall` removes it.")
    service.add_argument("action", choices=("install", "start", "stop", "status", "logs", "uninstall"))
    service.add_argument("arguments", nargs=argparse.REMAINDER, help="With install: the arguments of serve.")

    completion = commands.add_parser(
        "completion", allow_abbrev=False, help="print a shell's completion script",
        description="Print the script. For bash: eval \"$(vllm-mlx completion bash)\" in ~/.bashrc.")
    completion.add_argument("shell", choices=SHELLS)


def _positive(text: str) -> int:
    number = int(text) if text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1, not {text!r}")
    return number


def _add_talk(parser: argparse.ArgumentParser, *, has_model: bool = True) -> None:
    who = parser.add_argument_group("who answers", "By default the server on this machine, or else the built-in model.")
    if has_model:
        who.add_argument("--model", metavar="MODEL", help="Load this model here instead of asking a server.")
    who.add_argument("--server", metavar="URL", help="Ask this server.")
    who.add_argument("--api-key", metavar="KEY", help="Its API key [VLLM_MLX_CLIENT_API_KEY].")
    how = parser.add_argument_group("how", "What is not given is the model's own.")
    how.add_argument("--system", metavar="TEXT", help="System prompt.")
    how.add_argument("--temperature", type=float, metavar="N")
    how.add_argument("--top-p", type=float, metavar="N")
    how.add_argument("--max-tokens", type=int, metavar="N")
    how.add_argument("--frequency-penalty", type=float, metavar="N")
    how.add_argument("--seed", type=int, metavar="N")
    how.add_argument("--think", action=argparse.BooleanOptionalAction, default=None, help="Reason before answering.")
