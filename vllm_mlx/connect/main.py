"""`vllm-mlx connect CLIENT` shows or writes a client's settings for a running server; `launch` starts it with them."""

from __future__ import annotations

import argparse
import difflib
import os
import shlex
import shutil
from collections.abc import Callable, Sequence

from vllm_mlx.connect.clients import ALIASES, CLIENTS, KEY_VARIABLE, Plan
from vllm_mlx.connect.files import write
from vllm_mlx.connect.server import Server, ask, clean_url
from vllm_mlx.errors import VllmMlxError
from vllm_mlx.options import SentenceParser, UsageError

DEFAULT_URL = "http://127.0.0.1:8000"


def run(command: str, arguments: Sequence[str]) -> int:
    """Run `connect` or `launch`; returns the exit code. UsageError and VllmMlxError are one sentence each."""
    own, passed_on = _split(list(arguments))
    given = _parser(command).parse_args(own)
    plan = _find(given.client)(_server(given))
    if command == "launch":
        return launch(plan, passed_on)
    if passed_on:
        raise UsageError("arguments behind -- are for `vllm-mlx launch`.")
    if given.write:
        return write_all(plan)
    print(describe(plan), end="")
    return 0


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _parser(command: str) -> SentenceParser:
    names = ", ".join(CLIENTS)
    what = {
        "connect": "Print the settings of CLIENT for the running server, or write them.",
        "launch": "Start CLIENT with the settings for the running server; its own files stay as they are.",
    }[command]
    parser = SentenceParser(
        prog=f"vllm-mlx {command}", allow_abbrev=False, description=what,
        epilog=f"Clients: {names}. What stands behind -- is passed on to the client by `launch`.")  # fmt: skip
    parser.add_argument("client", metavar="CLIENT", help=f"one of {names}")
    parser.add_argument("--url", default=os.environ.get("VLLM_MLX_URL", DEFAULT_URL), help="where the server is")
    parser.add_argument("--model", metavar="NAME", help="the model's name; otherwise the one that is served")
    parser.add_argument("--api-key", metavar="KEY", default=os.environ.get(KEY_VARIABLE),
                        help=f"the server's key; otherwise ${KEY_VARIABLE}")  # fmt: skip
    if command == "connect":
        parser.add_argument("--write", action="store_true", help="write the files, each after a backup beside it")
    return parser


def _server(given: argparse.Namespace) -> Server:
    return ask(clean_url(given.url), key=given.api_key or None, model=given.model)


def _find(name: str) -> Callable[[Server], Plan]:
    key = ALIASES.get(name.lower(), name.lower())
    if key in CLIENTS:
        return CLIENTS[key]
    near = difflib.get_close_matches(key, [*CLIENTS, *ALIASES], 1)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(CLIENTS)}."
    raise UsageError(f"there is no client {name!r}; {hint}")


def describe(plan: Plan) -> str:
    """All that a person needs to do it by hand."""
    lines = [f"# {plan.title}"]
    for change in plan.changes:
        lines += ["", f"# in {change.path}", change.text().rstrip("\n")]
    if plan.environment:
        lines += ["", "# or in the environment" if plan.changes else "# in the environment"]
        lines += [f"export {name}={shlex.quote(value)}" for name, value in plan.environment.items()]
    if plan.command:
        lines += ["", "# start it", shlex.join(plan.command)]
    lines += ["", *(f"# {note}" for note in plan.notes)] if plan.notes else []
    return "\n".join(lines) + "\n"


def write_all(plan: Plan) -> int:
    if not plan.changes:
        raise VllmMlxError(f"{plan.title} has no settings file to write; run this without --write to see what to set.")
    for change in plan.changes:
        change.merged()  # all of them can be written, or none is
    for change in plan.changes:
        backup = write(change)
        print(f"Wrote {change.path}" + (f" (before: {backup})" if backup else ""))
    for note in plan.notes:
        print(f"Note: {note}")
    return 0


def launch(plan: Plan, passed_on: Sequence[str]) -> int:
    """Become the client."""
    if not plan.command:
        raise VllmMlxError(
            f"{plan.title} cannot be started from here; `vllm-mlx connect` shows what to set, and --write writes it."
        )
    program = shutil.which(plan.command[0])
    if program is None:
        raise VllmMlxError(f"{plan.command[0]} is not installed, or not in the PATH.")
    environment = {**os.environ, **plan.environment}
    os.execve(program, [program, *plan.command[1:], *passed_on], environment)
