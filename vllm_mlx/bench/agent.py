"""`vllm-mlx bench --agent`: what an agent's day costs, in counts and ratios.

sessions   prompt tokens computed in a growing conversation, over those that nobody can avoid; in memory, and restarted
restore    time to the first token of a long prompt, computed against read back from disk
gaps       other streams' gaps while a long prompt is computed
rows       one long row beside many short ones: bytes held, and speed against equal rows

Unavoidable is what a turn adds: its prompt beyond what it shares, token by token, with prompt and answer before.
asyncio thread.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2 import Environment
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from vllm_mlx import machine
from vllm_mlx.bench import plot, rivals, servers
from vllm_mlx.bench.agent_models import KINDS, build_kind
from vllm_mlx.bench.client import Endpoint, Receiver, send, stream_chat
from vllm_mlx.bench.measure import Trace
from vllm_mlx.bench.model import build
from vllm_mlx.bench.report import Number, Report
from vllm_mlx.bench.workloads import Message, Writer
from vllm_mlx.errors import SettingsError, VllmMlxError

PARTS = ("sessions", "restore", "gaps", "rows")
EXTRA = {"repetition_policy_override": "off", "ignore_eos": True, "temperature": 0}
SYSTEM_TOKENS, ANSWER_TOKENS = 2000, 32
SESSION_LIMIT = 1.02


@dataclass(frozen=True, slots=True)
class Row:
    """One number, and what is said of it; without a limit nothing is promised (rivals). None: it could not be taken."""

    part: str
    what: str
    number: float | None
    details: str
    limit: float | None = None
    at_least: bool = False
    unit: str = ""

    def as_number(self) -> Number:
        value = float("inf") if self.number is None else self.number
        return Number(f"{self.part}: {self.what}", value, self.limit, self.at_least, self.unit)

    @property
    def is_met(self) -> bool:
        return self.as_number().is_met

    @property
    def value(self) -> str:
        return self.details if self.number is None else f"{self.number:.3g}{self.unit} ({self.details})"

    @property
    def verdict(self) -> str:
        if self.limit is None:
            return ""
        sign = ">=" if self.at_least else "<="
        return f"{sign} {self.limit:g}{self.unit} {'✓' if self.is_met else '✗'}"


@dataclass
class Bill:
    """Prompt tokens of a session: computed, and unavoidable."""

    computed: int = 0
    unavoidable: int = 0
    seconds: list[float] = field(default_factory=list)

    def add(self, trace: Trace, num_new: int) -> None:
        """A turn whose prompt has `num_new` tokens that nobody can have computed before."""
        self.computed += (trace.num_prompt_tokens or 0) - (trace.num_cached_tokens or 0)
        self.unavoidable += num_new
        self.seconds.append((trace.stamps[0] if trace.stamps else trace.ended) - trace.started)

    @property
    def ratio(self) -> float:
        return self.computed / max(1, self.unavoidable)


class Reader:
    """Prompts as the model's tokens, each as its text: what a perfect cache could know of them."""

    def __init__(self, model: str) -> None:
        self._tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
        self._template = Environment().from_string((Path(model) / "chat_template.jinja").read_text())

    def tokens(self, messages: Sequence[Message]) -> list[str]:
        text = self._template.render(messages=messages, add_generation_prompt=True)
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        return [self._tokenizer.decode([i], skip_special_tokens=False) for i in ids]


class Session:
    """A conversation that grows turn by turn, as an agent's: instructions, then tool results of some length."""

    def __init__(self, model: str, seed: int, num_turns: int, num_tokens: int) -> None:
        writer = Writer(seed)
        per_turn = max(16, (num_tokens - SYSTEM_TOKENS) // num_turns - ANSWER_TOKENS)
        self.messages: list[Message] = [{"role": "system", "content": writer.text(SYSTEM_TOKENS)}]
        self.turns = [writer.text(per_turn) for _ in range(num_turns)]
        self._reader = Reader(model)
        self._computed: list[str] = []

    async def play(self, endpoint: Endpoint, turns: range, bill: Bill) -> None:
        for turn in turns:
            self.messages.append({"role": "user", "content": self.turns[turn]})
            prompt = self._reader.tokens(self.messages)
            trace = await _ask(endpoint, self.messages, ANSWER_TOKENS, logprobs=True)
            if trace.num_prompt_tokens != len(prompt):
                counts = f"{trace.num_prompt_tokens} prompt tokens, the tokenizer {len(prompt)}"
                raise VllmMlxError(f"The server counts {counts}.")
            bill.add(trace, len(prompt) - _common(prompt, self._computed))
            # The last token of an answer is given out, but nobody had to compute what follows it.
            self._computed = prompt + trace.tokens[:-1]
            self.messages.append({"role": "assistant", "content": trace.text})


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(argv: Sequence[str]) -> int:
    """The command; 1 when a promised number was missed."""
    options = parse(argv)
    console = Console(width=None if sys.stdout.isatty() else 150)
    rows = asyncio.run(_measure(options, console))
    table = Table(title="An agent's day")
    for heading in ("part", "what", "measured", "promised"):
        table.add_column(heading)
    for row in rows:
        table.add_row(row.part, row.what, row.value, row.verdict)
    console.print(table)
    if options.json:
        document = {"machine": machine.describe(), "rows": [{**asdict(row), "is_met": row.is_met} for row in rows]}
        Path(options.json).write_text(json.dumps(document, indent=1) + "\n")
    if options.plot:
        plot.draw(options.plot, [], [row.as_number() for row in rows], Report.title())
    return 0 if all(row.is_met for row in rows) else 1


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vllm-mlx bench --agent", allow_abbrev=False, description="Measure a day of agents."
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated, of {', '.join(PARTS)}")
    parser.add_argument("--kinds", default=",".join(KINDS), help=f"of caches, of {', '.join(KINDS)}")
    parser.add_argument("--turns", type=int, default=30)
    parser.add_argument("--session-tokens", type=int, default=20_000, help="of a session's last prompt, about")
    parser.add_argument("--prefix-tokens", type=int, default=10_000, help="of the prefix that is read back")
    parser.add_argument("--prefill-tokens", type=int, default=16_000, help="of the prompt beside running streams")
    parser.add_argument("--restore-size", default="150m", help="of the model whose prefix is read back")
    parser.add_argument("--rival", choices=("mlx-lm",), help="replay the sessions on mlx-lm's server too, on our BLAS")
    parser.add_argument("--folder", type=Path, help="where built models are kept")
    parser.add_argument("--json", metavar="FILE", help="write all numbers here")
    parser.add_argument("--plot", metavar="FILE", help="draw the promises here (.png, .svg, .pdf); needs matplotlib")
    options = parser.parse_args(list(argv))
    plot.check(options.plot)
    for name, known in (("parts", PARTS), ("kinds", KINDS)):
        chosen = getattr(options, name).split(",")
        if unknown := [word for word in chosen if word not in known]:
            raise SettingsError(f"--{name} does not know {unknown[0]!r}; choose of {', '.join(known)}.")
        setattr(options, name, chosen)
    return options


async def _measure(options: argparse.Namespace, console: Console) -> list[Row]:
    from vllm_mlx.bench.main import default_folder

    folder = options.folder or default_folder()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="vllm-mlx-agent-") as scratch:
        for part in options.parts:
            measured = {"sessions": _sessions, "restore": _restore, "gaps": _gaps, "rows": _rows}[part]
            async for row in measured(options, folder, Path(scratch)):
                console.print(f"{row.part}: {row.what}: {row.value}")
                rows.append(row)
    return rows


# ── sessions ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _sessions(options: argparse.Namespace, folder: Path, scratch: Path) -> AsyncIterator[Row]:
    for kind in options.kinds:
        model = str(build_kind(folder, kind))
        half, all_turns = options.turns // 2, options.turns
        disk = ["--disk-cache", str(scratch / kind)]

        bill, session = Bill(), Session(model, 7, all_turns, options.session_tokens)
        async with _ours(model) as endpoint:
            await session.play(endpoint, range(all_turns), bill)
        yield _session_row(kind, "in memory", bill, SESSION_LIMIT)

        bill, session = Bill(), Session(model, 8, all_turns, options.session_tokens)
        async with _ours(model, disk) as endpoint:
            await session.play(endpoint, range(half), bill)
        async with _ours(model, disk) as endpoint:
            await session.play(endpoint, range(half, all_turns), bill)
        yield _session_row(kind, "restarted half way, from disk", bill, SESSION_LIMIT)

        if options.rival:
            bill, session = Bill(), Session(model, 7, all_turns, options.session_tokens)
            try:
                async with _mlx_lm(model) as endpoint:
                    await session.play(endpoint, range(half), bill)
                    yield _session_row(kind, f"mlx-lm's server, the first {half} turns", bill, None)
                    await session.play(endpoint, range(half, all_turns), bill)
                yield _session_row(kind, "mlx-lm's server, in memory", bill, None)
            except VllmMlxError as error:
                yield Row("sessions", f"{kind}, mlx-lm's server", None, f"fails: {str(error)[:80]}")


def _session_row(kind: str, what: str, bill: Bill, limit: float | None) -> Row:
    seconds = f"{statistics.median(bill.seconds):.2f} s to the first token"
    details = f"{bill.computed} computed, {bill.unavoidable} unavoidable; {seconds}"
    return Row("sessions", f"{kind}, {what}", round(bill.ratio, 3), details, limit)


# ── restore ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _restore(options: argparse.Namespace, folder: Path, scratch: Path) -> AsyncIterator[Row]:
    """The same prompt with another last line: computed, then read back by a new process."""
    model, disk = str(build(folder, options.restore_size)), ["--disk-cache", str(scratch / "restore")]
    writer = Writer(11)
    stem = {"role": "system", "content": writer.text(options.prefix_tokens)}
    questions = [{"role": "user", "content": writer.text(16)} for _ in range(3)]

    async def first_token(endpoint: Endpoint, question: Message) -> tuple[float, int, int]:
        trace = await _ask(endpoint, [stem, question], 1)
        return trace.stamps[0] - trace.started, trace.num_prompt_tokens or 0, trace.num_cached_tokens or 0

    async with _ours(model, disk) as endpoint:
        computed_s, num_prompt, _ = await first_token(endpoint, questions[0])
    read = []
    for question in questions[1:]:
        async with _ours(model, disk) as endpoint:
            seconds, _, num_cached = await first_token(endpoint, question)
            read.append(seconds)
    ratio = computed_s / statistics.median(read)
    details = (
        f"{computed_s:.2f} s computed, {statistics.median(read):.2f} s read; {num_cached} of {num_prompt} tokens"
    )
    yield Row("restore", f"{options.restore_size} model", ratio, details, 10, at_least=True, unit=" times")


# ── gaps ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _gaps(options: argparse.Namespace, folder: Path, scratch: Path) -> AsyncIterator[Row]:
    """Four streams run while one long prompt is computed: their gaps within that time."""
    model, target_s, writer = str(build(folder, "30m")), 0.25, Writer(13)
    flags = ["--runtime-mode", "batched", "--stall-target-ms", str(target_s * 1000)]
    async with _ours(model, flags) as endpoint, AsyncExitStack() as stack:
        streams = [await _open(endpoint, _prompt(writer, 24), 20_000, stack) for _ in range(4)]
        await asyncio.sleep(2)
        long = await _ask(endpoint, _prompt(writer, options.prefill_tokens), 1)
        gaps = [
            later - earlier
            for stream in streams
            for (earlier, _), (later, _) in pairwise(stream.pieces)
            if long.started <= earlier and later <= long.stamps[0]
        ]
    p99 = statistics.quantiles(gaps, n=100)[98]
    details = (
        f"median {statistics.median(gaps) * 1000:.0f} ms, most {max(gaps) * 1000:.0f} ms; "
        f"{long.num_prompt_tokens} tokens in {long.stamps[0] - long.started:.1f} s"
    )
    yield Row("gaps", "4 streams beside one prompt, p99", p99 * 1000, details, 2000 * target_s, unit=" ms")


# ── rows ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _rows(options: argparse.Namespace, folder: Path, scratch: Path) -> AsyncIterator[Row]:
    """Decoding of one long and 31 short rows, and of 32 equal ones with as many tokens together."""
    model, long, short = str(build(folder, "30m")), 8192, 256
    equal = (long + 31 * short) // 32
    speeds: dict[str, list[float]] = {"mixed": [], "equal": []}
    worst = 1.0
    async with _ours(model, ["--runtime-mode", "batched", "--disable-prefix-cache"]) as endpoint:
        for round_ in range(3):
            for name, lengths in (("mixed", [long] + [short] * 31), ("equal", [equal] * 32)):
                speed, ratio = await _decode_speed(endpoint, lengths, seed=100 * round_ + len(name))
                speeds[name].append(speed)
                worst = max(worst, ratio) if name == "mixed" else worst
    yield Row("rows", "KV bytes held, of those of the tokens alive", worst, "at most, 32 rows", 1.25)
    mixed, same = statistics.median(speeds["mixed"]), statistics.median(speeds["equal"])
    details = f"{mixed:.0f} tokens/s mixed, {same:.0f} equal"
    yield Row("rows", "decode speed, of 32 equal rows", mixed / same, details, 0.8, at_least=True)


async def _decode_speed(endpoint: Endpoint, lengths: Sequence[int], *, seed: int) -> tuple[float, float]:
    """Tokens a second while all rows decode for ten seconds, and the most KV held over KV alive."""
    writer, worst = Writer(seed), 1.0
    async with AsyncExitStack() as stack:
        streams = [await _open(endpoint, _prompt(writer, length), 20_000, stack) for length in lengths]
        while not all(_num_tokens(stream) > 1 for stream in streams):
            await asyncio.sleep(0.1)
        started, before = time.perf_counter(), sum(_num_tokens(stream) for stream in streams)
        while time.perf_counter() - started < 8:
            await asyncio.sleep(1)
            stats = await asyncio.to_thread(get_json, endpoint, "/v1/cache/stats")
            worst = max(worst, float(stats["kv_held_ratio"] or 1))
        num_tokens = sum(_num_tokens(stream) for stream in streams) - before
        seconds = time.perf_counter() - started
    while (await asyncio.to_thread(get_json, endpoint, "/v1/status"))["num_running"]:
        await asyncio.sleep(0.1)
    return num_tokens / seconds, worst


def _num_tokens(stream: Receiver) -> int:
    return sum(data.count(b"data: ") for _, data in stream.pieces)


# ── small pieces ────────────────────────────────────────────────────────────────────────────────────────────────────


@asynccontextmanager
async def _ours(model: str, flags: Sequence[str] = ()) -> AsyncIterator[Endpoint]:
    port = servers.free_port()
    command = servers.ours(model, port, [*flags, "--timeout", "3600"])
    async with servers.running(command, port, "default") as (endpoint, _):
        yield endpoint


@asynccontextmanager
async def _mlx_lm(model: str) -> AsyncIterator[Endpoint]:
    port = servers.free_port()
    command = rivals.command(rivals.RIVALS["mlx-lm"], model, port, rivals.Blas.OURS)
    async with servers.running(command, port, "default_model") as (endpoint, _):
        yield endpoint


async def _ask(
    endpoint: Endpoint, messages: Sequence[Message], max_tokens: int, *, logprobs: bool = False
) -> Trace:
    body = {
        "model": endpoint.model,
        "messages": list(messages),
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **EXTRA,
    }
    if logprobs:
        body["logprobs"] = True
    trace = await stream_chat(endpoint, body)
    if trace.error is not None:
        raise VllmMlxError(f"A request failed: {trace.error}")
    return trace


async def _open(
    endpoint: Endpoint, messages: Sequence[Message], max_tokens: int, stack: AsyncExitStack
) -> Receiver:
    """A stream that goes on until the stack ends it."""
    body = {"model": endpoint.model, "messages": list(messages), "max_tokens": max_tokens, "stream": True, **EXTRA}
    transport, receiver = await send(endpoint, "/chat/completions", json.dumps(body).encode())
    stack.callback(transport.abort)
    return receiver


def _prompt(writer: Writer, num_tokens: int) -> list[Message]:
    return [{"role": "user", "content": writer.text(num_tokens)}]


def get_json(endpoint: Endpoint, path: str) -> Any:
    """What the server answers at `path`, which is not under /v1 by itself. Blocks."""
    root = endpoint.url.removesuffix("/v1")
    with urllib.request.urlopen(root + path, timeout=30) as answer:
        return json.load(answer)
