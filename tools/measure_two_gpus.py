"""One model on one device beside the same model on two (or more), tensor parallel, through the engine.

    python tools/measure_two_gpus.py --model 8b --json FILE          # two GPUs of this machine, over NCCL
    python tools/measure_two_gpus.py --model small --backend ring    # two processes of a CPU: does it work at all

Starts its own processes, one a device, as `mlx.launch` would; weights are random and nothing is downloaded. Three ways
are measured on the same prompts: `one`, the engine as it serves; `one, led`, the same device with the runner that other
ranks follow but none that does, so what is lost by not overlapping steps shows by itself; `N ranks`. Prefill is the
time to the first token of one prompt, a step the median of steady ones. The sums that the ranks make are timed alone
too. The parent imports no MLX. Needs MLX, mlx-lm and llguidance only.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MARK = "FOUND "
ROUNDS = 3
KEY = "MEASURE_KEY"


# ── the parent: starts the processes, gathers what rank 0 prints ────────────────────────────────────────────────────


def ports(count: int) -> list[int]:
    """Free ports of this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = [int(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return found


def environment(backend: str, rank: int, taken: Sequence[int], folder: Path) -> dict[str, str]:
    """What MLX's launcher would set for this rank; `taken`: a port a rank, then one for the plans."""
    size = len(taken) - 1
    own = {"MLX_RANK": str(rank), "MLX_WORLD_SIZE": str(size), "PYTHONUNBUFFERED": "1"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    if backend == "nccl":
        own |= {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(taken[0]), "CUDA_VISIBLE_DEVICES": str(rank)}
    else:
        hosts = folder / f"hosts-{taken[0]}.json"
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in taken[:size]]))
        own["MLX_HOSTFILE"] = str(hosts)
    if size == 1:
        own = {name: value for name, value in own.items() if not name.startswith(("MLX_", "NCCL_"))}
    return {**os.environ, **own}


def run_group(size: int, options: argparse.Namespace, found: Callable[[dict[str, Any]], None]) -> bool:
    """Start `size` ranks and pass on what rank 0 finds, until all have ended. False if one failed or took too long."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        taken = ports(size + 1)
        key = secrets.token_hex(16)
        command = [sys.executable, __file__, *options.passed, "--port", str(taken[-1]), "--size", str(size)]
        processes = []
        for rank in range(size):
            env = {**environment(options.backend, rank, taken, Path(folder)), KEY: key}
            stdout = subprocess.PIPE if rank == 0 else None
            processes.append(subprocess.Popen([*command, "--rank", str(rank)], env=env, stdout=stdout, text=True))
        limit = time.monotonic() + options.limit
        killer = _kill_at(limit, processes)
        lead = processes[0]
        assert lead.stdout is not None
        for line in lead.stdout:
            if line.startswith(MARK):
                found(json.loads(line[len(MARK) :]))
            else:
                print(line, end="", flush=True)
        codes = [process.wait() for process in processes]
        killer.cancel()
        if any(codes):
            print(f"{size} ranks ended with exit codes {codes}", flush=True)
        return not any(codes)


def _kill_at(limit: float, processes: Sequence[subprocess.Popen[str]]) -> Any:
    import threading

    def kill() -> None:
        print("out of time: the processes are ended", flush=True)
        for process in processes:
            process.kill()

    timer = threading.Timer(max(0.0, limit - time.monotonic()), kill)
    timer.daemon = True
    timer.start()
    return timer


# ── a rank ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def tell(**facts: Any) -> None:
    print(MARK + json.dumps(facts), flush=True)


def be_rank(options: argparse.Namespace) -> None:
    """Load this rank's part and measure (rank 0) or follow (the others)."""
    from tools import measure_gpu  # imports MLX

    mx = measure_gpu.mx
    rank, size = options.rank, options.size
    model = measure_gpu.make_model(options.model, options.bits)
    whole_bytes = measure_gpu.bytes_of(model)
    if size > 1:
        from vllm_mlx.models import sharding
        from vllm_mlx.models.profile import ModelProfile

        assert sharding.place() == (rank, size), f"{sharding.place()} instead of {(rank, size)}"
        config = {name: getattr(model.args, name) for name in sharding.HEADS}
        sharding.splitter("tensor", ModelProfile(options.model, Path("."), "qwen3"), config)(model)
        mx.eval(model.parameters())
        mx.clear_cache()
    if rank:
        follow(options, model)
        return
    facts = {
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "size": size,
        "model": options.model,
        "bits": options.bits,
        "step_bytes": measure_gpu.bytes_of(model),
        "whole_step_bytes": whole_bytes,
        "copy_GB_s": measure_gpu.copy_bandwidth() / 1e9,
        "matmul_TFLOP_s": measure_gpu.matmul_rate() / 1e12,
    }
    tell(kind="device", **facts)
    if size > 1:
        listener = Listener(("127.0.0.1", options.port), authkey=os.environ[KEY].encode())
        connections = [listener.accept() for _ in range(size - 1)]
        tell(kind="sums", ms=time_sums(model, options))
        measure(options, model, f"{size} ranks", connections)
        for connection in connections:
            connection.send(None)
    else:
        measure(options, model, "one", None)
        measure(options, model, "one, led", [])


def follow(options: argparse.Namespace, model: Any) -> None:
    """Be another rank until rank 0 says None."""
    from tools.measure_gpu import ModelProfile, TextModel
    from vllm_mlx.engine.assembly import build_runner
    from vllm_mlx.engine.ranks import Follower

    connection = _connect(options.port)
    time_sums(model, options)
    profile = ModelProfile("qwen3", Path("."), "qwen3", vocab_size=model.args.vocab_size)
    follower = Follower(build_runner(TextModel(model, profile), connection.recv(), samples=False))
    while (messages := connection.recv()) is not None:
        follower.follow(messages)


def _connect(port: int) -> Connection:
    while True:
        try:
            return Client(("127.0.0.1", port), authkey=os.environ[KEY].encode())
        except ConnectionRefusedError:
            time.sleep(0.1)


def time_sums(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Milliseconds of the sums of one forward, alone: two a layer, of so many tokens. All ranks call it."""
    from tools.measure_gpu import mx

    count, width = 2 * model.args.num_hidden_layers, model.args.hidden_size
    dtype = mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32
    found = {}
    for tokens in (1, 8, 32, 512, 2048):
        times = []
        for _ in range(8):
            x = mx.zeros((tokens, width), dtype=dtype)
            mx.eval(x)
            start = time.perf_counter()
            for _ in range(count):
                x = mx.distributed.all_sum(x)
            mx.eval(x)
            times.append(time.perf_counter() - start)
        found[str(tokens)] = 1e3 * statistics.median(times[2:])
    return found


def measure(options: argparse.Namespace, model: Any, way: str, connections: Sequence[Connection] | None) -> None:
    """Tell every case of one way. `connections`: to the ranks that follow; None for the runner as it serves alone."""
    from tools.measure_gpu import Ours, as_served, prompts_of
    from vllm_mlx.engine.ranks import LeadRunner

    def send(messages: Any) -> None:
        for connection in connections or ():
            connection.send(messages)

    def lost(why: str) -> None:
        raise SystemExit(why)

    rows = [int(n) for n in options.rows.split(",")]
    # The ranks that follow build their runner while this one does: its tracing is not evaluated, so they need not meet.
    lead = (lambda runner: LeadRunner(runner, send, lost)) if connections is not None else None
    ours = Ours(as_served(model), max(rows), 512 << 20, lead)
    for connection in connections or ():
        connection.send(ours.options)
    ours.run(prompts_of("64", max(rows), 99, model.args.vocab_size), 4)  # compiles what is compiled
    for length in options.prompts.split(","):
        runs = []
        for number in range(ROUNDS):
            prompt = prompts_of(length, 1, number, model.args.vocab_size)
            runs.append(_first_token_s(ours, prompt[0]))
        tell(kind="prefill", way=way, tokens=int(length), seconds=statistics.median(runs), runs=runs)
    for num_rows in rows:
        times, waits, firsts = [], [], []
        for number in range(ROUNDS):
            before = set(ours.tokens)
            prompts = prompts_of(options.context, num_rows, number, model.args.vocab_size)
            _, run, waited = ours.run(prompts, options.steps)
            times += run
            waits.append(waited)
            firsts += [ours.tokens[name][:8] for name in ours.tokens if name not in before]
        tell(kind="step", way=way, rows=num_rows, context=int(options.context), ms=1e3 * statistics.median(times),
             wait_ms=1e3 * statistics.median(waits), tokens=firsts)  # fmt: skip


def _first_token_s(ours: Any, prompt: Sequence[int]) -> float:
    """Seconds from asking to the first token of one prompt by itself."""
    from vllm_mlx.engine.request import Prompt, Request

    name = f"first{len(ours.tokens)}"
    start = time.perf_counter()
    ours.engine.submit(Request(name, Prompt(tuple(prompt)), 1))
    while not ours.tokens[name]:
        ours.engine.step()
    elapsed = time.perf_counter() - start
    while ours.engine.has_work:
        ours.engine.step()
    return elapsed


# ── the report ──────────────────────────────────────────────────────────────────────────────────────────────────────


def report(found: Sequence[dict[str, Any]]) -> str:
    """The cases side by side, as a table."""
    ways = list(dict.fromkeys(case["way"] for case in found if "way" in case))
    lines = ["| | " + " | ".join(ways) + " |", "| --- |" + " ---: |" * len(ways)]
    table: dict[str, dict[str, str]] = {}
    for case in found:
        if case["kind"] == "prefill":
            table.setdefault(f"prefill of {case['tokens']}, s", {})[case["way"]] = f"{case['seconds']:.3f}"
        elif case["kind"] == "step":
            shown = f"{case['ms']:.2f} ({case['wait_ms']:.2f} waiting)"
            table.setdefault(f"step of {case['rows']} rows, ms", {})[case["way"]] = shown
    lines += [f"| {name} | " + " | ".join(row.get(way, "-") for way in ways) + " |" for name, row in table.items()]
    lines += [f"sums of one forward alone, ms by tokens: {case['ms']}" for case in found if case["kind"] == "sums"]
    return "\n".join([*lines, *_agreement(found)])


def _agreement(found: Sequence[dict[str, Any]]) -> list[str]:
    """How many of the first greedy tokens are those of one device; sums in another order round otherwise in bf16."""
    lines = []
    alone = {case["rows"]: case["tokens"] for case in found if case.get("way") == "one" and case["kind"] == "step"}
    for case in found:
        if case["kind"] == "step" and case["way"] != "one" and case["rows"] in alone:
            pairs = list(zip(alone[case["rows"]], case["tokens"], strict=True))
            same = sum(a == b for a, b in pairs)
            lines.append(
                f"{case['way']}, {case['rows']} rows: {same} of {len(pairs)} begin with the same 8 greedy tokens"
            )
    return lines


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="8b", help="small, 0.6b, 4b or 8b: shapes of tools/measure_gpu.py")
    parser.add_argument("--bits", type=int, default=16)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", default="1,8,32")
    parser.add_argument("--context", default="512", help="length of the prompts of the rows")
    parser.add_argument("--prompts", default="512,2048,8192", help="prompt lengths whose prefill is timed")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument(
        "--backend", choices=("nccl", "ring"), default="nccl" if Path("/dev/nvidia0").exists() else "ring"
    )
    parser.add_argument("--limit", type=float, default=280, help="seconds for each group of processes")
    parser.add_argument("--json", type=Path)
    for name in ("--rank", "--size", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.rank is not None:
        be_rank(options)
        return 0
    options.passed = list(argv)
    found: list[dict[str, Any]] = []

    def keep(case: dict[str, Any]) -> None:
        found.append(case)
        print(json.dumps({k: v for k, v in case.items() if k != "tokens" or case["kind"] != "step"}), flush=True)
        if options.json:
            options.json.write_text(json.dumps(found, indent=1))

    is_sound = all([run_group(size, options, keep) for size in (1, options.ranks)])
    print(report(found))
    return 0 if is_sound else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
