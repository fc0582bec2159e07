"""`vllm-mlx bench`: measures this server, the engine alone, other projects' servers, or any OpenAI-compatible URL.

Without a URL it builds its own small model, starts the servers itself, and ends them. Targets take turns within each
round, on the same prompts, so that a busy machine hurts all alike; medians over the rounds are shown.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from rich.console import Console

from vllm_mlx.bench import numbers, plot, rivals, servers, speed, workloads
from vllm_mlx.bench.client import Endpoint
from vllm_mlx.bench.floor import measure_floor
from vllm_mlx.bench.image_model import build_image_model
from vllm_mlx.bench.images import ImageBench
from vllm_mlx.bench.model import SIZES, build
from vllm_mlx.bench.report import Report, Run
from vllm_mlx.bench.targets import HttpTarget, OfflineTarget, Target, measure
from vllm_mlx.errors import SettingsError

TABLE_WIDTH = 150
# Random weights often fall into loops, and every answer must have its full length. Others ignore the field.
EXTRA = {"repetition_policy_override": "off"}


def run(argv: Sequence[str]) -> int:
    """The command; returns the exit code: 1 when a number was missed or a request failed."""
    if "--agent" in argv:
        from vllm_mlx.bench import agent

        return agent.run([argument for argument in argv if argument != "--agent"])
    options = parse(argv)
    is_shown = sys.stderr.isatty() if options.json == "-" else sys.stdout.isatty()
    console = Console(stderr=options.json == "-", width=None if is_shown else TABLE_WIDTH)
    report = Report()
    asyncio.run(_measure(options, report, console))
    report.show(console)
    if options.json == "-":
        print(report.to_json())
    elif options.json:
        Path(options.json).write_text(report.to_json() + "\n")
    if options.plot:
        plot.draw(options.plot, report.runs, report.numbers, report.title())
    is_good = all(n.is_met for n in report.numbers) and not any(r.summary.num_failed for r in report.runs)
    return 0 if is_good and report.runs else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Flags, checked; raises SettingsError."""
    parser = argparse.ArgumentParser(
        prog="vllm-mlx bench", allow_abbrev=False, description=__doc__.split("\n\n")[1].replace("\n", " ")
    )
    parser.add_argument("model", nargs="?", help="model to start servers on; otherwise one of random weights is built")
    parser.add_argument("--agent", action="store_true",
                        help="measure a day of agents instead: sessions, restarts, stalls (`bench --agent --help`)")
    parser.add_argument("--numbers", action="store_true", help="measure the numbers this server promises")
    parser.add_argument("--speed", action="store_true",
                        help="measure the speed this server promises beside the best --rival")
    parser.add_argument("--images", action="store_true", help="measure what this server promises for pictures")
    parser.add_argument("--url", help="measure this running server instead of starting one, e.g. http://host:8000/v1")
    parser.add_argument("--compare", metavar="URL", action="append", default=[],
                        help="a second running server, interleaved with the first; may be repeated")
    parser.add_argument("--rival", choices=tuple(rivals.RIVALS), action="append", default=[],
                        help="start this project's server too, on our BLAS and as it installs; may be repeated")
    parser.add_argument("--rival-python", action="append", default=[], metavar="[NAME=]PATH",
                        help="interpreter that has the rival (or all rivals); may be repeated")
    parser.add_argument("--offline", action="store_true", help="measure the engine alone, in a process of its own, too")
    parser.add_argument("--profile", action="store_true", help="where a step's time goes, in the engine alone")
    parser.add_argument("--served-name", default="default", metavar="ID", help="model id sent to --url and --compare")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_MLX_API_KEY"), help="key for --url and --compare")
    parser.add_argument("--workload", default="short,shared,multi-turn", metavar="NAMES",
                        help=f"comma-separated, of {', '.join(workloads.WORKLOADS)}")
    parser.add_argument("--streams", default="1,16", metavar="NS", help="comma-separated numbers of concurrent streams")
    parser.add_argument("--requests", type=int, metavar="N", help="requests a run; otherwise one a stream")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="length of each answer: 64, with --images 128")
    parser.add_argument("--prompt-tokens", type=int, default=2000, metavar="N", help="length of long prompts, about")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", choices=tuple(SIZES), default="30m", help="of the model that is built")
    parser.add_argument("--folder", type=Path, metavar="DIR", help="where the built model is kept")
    parser.add_argument("--json", metavar="FILE", help="write all runs here; `-` for standard output")
    parser.add_argument("--plot", metavar="FILE", help="draw all runs here (.png, .svg, .pdf); needs matplotlib")
    options = parser.parse_args(list(argv))
    plot.check(options.plot)
    options.workload = options.workload.split(",")
    if options.max_tokens is None:
        options.max_tokens = 128 if options.images else 64
    if unknown := [name for name in options.workload if name not in workloads.WORKLOADS]:
        raise SettingsError(f"--workload does not know {unknown[0]!r}; choose of {', '.join(workloads.WORKLOADS)}.")
    try:
        options.streams = [int(number) for number in options.streams.split(",")]
    except ValueError:
        raise SettingsError(f"--streams takes numbers separated by commas, not {options.streams!r}.") from None
    for flag, value in (("--rounds", options.rounds), ("--max-tokens", options.max_tokens),
                        ("--requests", options.requests or 1), ("--streams", min(options.streams)),
                        ("--prompt-tokens", options.prompt_tokens)):  # fmt: skip
        if value < 1:
            raise SettingsError(f"{flag} must be at least 1, not {value}.")
    if options.url and (options.rival or options.offline or options.model):
        raise SettingsError("--url measures a running server; MODEL, --rival and --offline start their own. Give one.")
    if options.profile and (options.url or options.images):
        raise SettingsError("--profile looks into the engine, which --url and --images do not start; leave it out.")
    options.offline = options.offline or options.profile
    if options.offline and "structured" in options.workload:
        raise SettingsError("The engine alone knows no grammars: --workload structured needs servers only.")
    if options.compare and not options.url:
        raise SettingsError("--compare needs --url, the server to compare with.")
    if options.speed and (options.url or options.numbers or options.images):
        raise SettingsError("--speed is a measurement of its own: leave --url, --numbers and --images out.")
    if options.numbers and set(options.rival) - {"mlx-lm"}:
        raise SettingsError("--numbers are promised beside mlx-lm; --speed measures beside the other rivals.")
    options.rival_python = rivals.interpreters(options.rival_python, options.rival)
    if options.images and (options.numbers or options.rival or options.offline):
        raise SettingsError("--images measures servers of this program; leave --numbers, --rival and --offline out.")
    if options.numbers and options.url:
        raise SettingsError("--numbers starts its own servers; leave --url out.")
    return options


async def _measure(options: argparse.Namespace, report: Report, console: Console) -> None:
    async with AsyncExitStack() as stack:
        model, targets = await _targets(options, stack, console, report)
        console.print(f"measuring {', '.join(targets)} ...")
        if options.images:
            for target in targets.values():
                assert isinstance(target, HttpTarget)
                bench = ImageBench(
                    target.name, target.endpoint, report, max_tokens=options.max_tokens, seed=options.seed
                )
                await bench.run(options.rounds)
        elif options.speed:
            await speed.measure_speed(
                targets, report, model=model, num_rounds=options.rounds, seed=options.seed, say=console.print
            )
        elif options.numbers:
            await numbers.measure_numbers(
                targets, report, num_rounds=options.rounds, max_tokens=options.max_tokens, seed=options.seed
            )
        else:
            await _measure_workloads(options, list(targets.values()), report)
        if options.profile:
            for target in targets.values():
                if isinstance(target, OfflineTarget):
                    console.print(_shares(await target.seconds()))


def _shares(seconds: dict[str, float]) -> str:
    total = seconds.pop("step", 0.0) or 1.0
    known = ", ".join(f"{name} {100 * s / total:.1f} %" for name, s in seconds.items())
    rest = 100 * (1 - sum(seconds.values()) / total)
    return f"a step of the engine: {known}, the rest {rest:.1f} %"


async def _measure_workloads(options: argparse.Namespace, targets: list[Target], report: Report) -> None:
    for round_number in range(options.rounds):
        turn = round_number % len(targets)
        for number, workload in enumerate(options.workload):
            for num_streams in options.streams:
                for target in targets[turn:] + targets[:turn]:
                    conversations = workloads.make(
                        workload,
                        options.requests or num_streams,
                        seed=options.seed + 1000 * round_number + 100 * number + num_streams,
                        max_tokens=options.max_tokens,
                        prompt_tokens=options.prompt_tokens,
                    )
                    summary = await measure(target, conversations, num_streams)
                    report.runs.append(Run(target.name, workload, num_streams, round_number, summary))


async def _targets(
    options: argparse.Namespace, stack: AsyncExitStack, console: Console, report: Report
) -> tuple[str, dict[str, Target]]:
    """The model's folder, and what is to be measured, by name; servers that were started end with the stack."""
    if options.url:
        urls = [options.url, *options.compare]
        return "", {url: HttpTarget(url, Endpoint(url, options.served_name, options.api_key), EXTRA) for url in urls}
    make_model = build_image_model if options.images else build
    model = options.model or str(make_model(options.folder or default_folder(), options.size))
    console.print(f"model: {model}")
    if Path(model).is_dir():
        report.floor = await measure_floor(Path(model))
    targets: dict[str, Target] = {}

    async def start(name: str, make: list[str], port: int, model_id: str) -> None:
        endpoint, pid = await stack.enter_async_context(servers.running(make, port, model_id))
        targets[name] = HttpTarget(name, endpoint, EXTRA, pid)

    port = servers.free_port()
    await start(numbers.OURS, servers.ours(model, port), port, "default")
    if options.offline or options.numbers or options.speed:
        offline = await OfflineTarget.start(model)
        stack.push_async_callback(offline.stop)
        targets[offline.name] = offline
    for name in options.rival:
        rival, python = rivals.RIVALS[name], options.rival_python[name]
        # In the other tables there is one rival, and its name is enough.
        title = f"{name} {rivals.version_of(rival, python)}, {{}}" if options.speed else f"{name}, {{}}"
        for blas in rivals.Blas if options.speed or options.numbers else (rivals.Blas.OURS, rivals.Blas.INSTALLED):
            port = servers.free_port()
            console.print(f"starting {title.format(blas)} ...")
            command = rivals.command(rival, model, port, blas, python)
            await start(title.format(blas), command, port, rival.model_id.format(model=model))
    return model, targets


def default_folder() -> Path:
    """Where built models are kept: the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "vllm-mlx"
