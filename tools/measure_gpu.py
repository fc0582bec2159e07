"""The engine's decode step on whatever device MLX has, beside mlx-lm's own batch generation, on random Qwen3 weights.

    python tools/measure_gpu.py --models 0.6b,4b,8b --bits 16,4 --rows 1,8,32,64 [--json FILE]

Nothing is downloaded, and nothing is left behind but the JSON. For each model and each number of rows both sides decode
the same prompts greedily, in turns, and the medians of their steady steps are shown beside the least that reading
weights and keys once takes at the copy bandwidth measured first. `waiting`: the part of our step that the host spends
waiting for the device; where it is not zero, the device is never left without work. `--host` measures what
scheduler, sampler and publishing cost the host with 256 rows of a model so small that nothing else counts.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vllm_mlx import blas

blas.load()  # before MLX; does nothing where there is a GPU

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map  # noqa: E402
from mlx_lm.generate import BatchGenerator  # noqa: E402
from mlx_lm.models import qwen3  # noqa: E402

from vllm_mlx.engine.assembly import EngineOptions, build_engine  # noqa: E402
from vllm_mlx.engine.engine import Engine  # noqa: E402
from vllm_mlx.engine.ranks import LeadRunner  # noqa: E402
from vllm_mlx.engine.request import Prompt, Request, SamplingParams  # noqa: E402
from vllm_mlx.engine.runner import ModelRunner  # noqa: E402
from vllm_mlx.engine.step import EngineStatus, TokenEvent  # noqa: E402
from vllm_mlx.models import prompt_attention  # noqa: E402
from vllm_mlx.models.profile import ModelProfile  # noqa: E402
from vllm_mlx.models.text import TextModel  # noqa: E402

VOCAB = 151936
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
                 intermediate_size=128, tie_word_embeddings=True, vocab_size=1024),
    "small": dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                  intermediate_size=128, tie_word_embeddings=True, vocab_size=1024),
    "0.6b": dict(hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, num_key_value_heads=8, head_dim=128,
                 intermediate_size=3072, tie_word_embeddings=True),
    "4b": dict(hidden_size=2560, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               intermediate_size=9728, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128,
               intermediate_size=12288, tie_word_embeddings=False),
}  # fmt: skip
ROUNDS = 3
MLX_ATTENTION = mx.fast.scaled_dot_product_attention  # before ours is put in its place
prompt_attention.install()


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the report; times in milliseconds a step. None where a side was not measured."""

    model: str
    bits: int
    rows: int
    context: str
    ours_ms: float
    wait_ms: float
    theirs_ms: float | None
    floor_ms: float
    prefill_ours_s: float
    prefill_theirs_s: float | None
    error: str = ""


def make_model(name: str, bits: int) -> qwen3.Model:
    shape = {"vocab_size": VOCAB, **SHAPES[name]}
    arguments = qwen3.ModelArgs.from_dict(
        {"model_type": "qwen3", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1e6, **shape}
    )
    mx.random.seed(0)
    model = qwen3.Model(arguments)
    model.set_dtype(mx.bfloat16 if mx.default_device().type == mx.gpu else mx.float32)
    if bits < 16:
        nn.quantize(model, 64, bits)
    mx.eval(model.parameters())
    return model


def twin_of(model: qwen3.Model, bits: int) -> qwen3.Model:
    """Another model object over the same arrays: ours puts its own modules around the layers' attention."""
    other = qwen3.Model(model.args)
    if bits < 16:
        nn.quantize(other, 64, bits)
    other.update(tree_map(lambda a: a, model.parameters()))
    return other


def bytes_of(model: qwen3.Model) -> int:
    """What a step reads: all weights, but of an untied embedding only a row."""
    skipped = () if model.args.tie_word_embeddings else ("model.embed_tokens",)
    return sum(a.nbytes for name, a in tree_flatten(model.parameters()) if not name.startswith(skipped or "-"))


def kv_bytes(model: qwen3.Model, num_tokens: int) -> int:
    args = model.args
    size = 2 if mx.default_device().type == mx.gpu else 4
    return num_tokens * args.num_hidden_layers * 2 * args.num_key_value_heads * args.head_dim * size


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a large copy."""
    is_gpu = mx.default_device().type == mx.gpu
    x = mx.zeros(((1 << 30) if is_gpu else (1 << 26),), dtype=mx.uint8).view(mx.uint32)
    mx.eval(x)
    return 2 * x.nbytes / min(_seconds(lambda: mx.eval(x + 1)) for _ in range(8))


def matmul_rate() -> float:
    """FLOP/s of a square product in the type that models are computed in."""
    is_gpu = mx.default_device().type == mx.gpu
    size = 8192 if is_gpu else 1024
    a = mx.random.normal((size, size)).astype(mx.bfloat16 if is_gpu else mx.float32)
    mx.eval(a)
    return 2 * size**3 / min(_seconds(lambda: mx.eval(a @ a)) for _ in range(8))


def _seconds(job: Callable[[], object]) -> float:
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def prompts_of(context: str, rows: int, seed: int, vocab: int) -> list[list[int]]:
    """`mixed`: from 64 to 4096 tokens; else as many as it says."""
    rng = random.Random(seed)
    lengths = [rng.choice([64, 256, 1024, 4096]) if context == "mixed" else int(context) for _ in range(rows)]
    return [[rng.randrange(vocab) for _ in range(length)] for length in lengths]


_folders: list[tempfile.TemporaryDirectory[str]] = []


def as_served(model: qwen3.Model) -> TextModel:
    """The model as the engine takes it; once for a model, because it puts modules of its own around the layers'."""
    _folders.append(tempfile.TemporaryDirectory())  # the engine reads the config to know what activations take
    folder = Path(_folders[-1].name)
    (folder / "config.json").write_text(json.dumps(asdict(model.args)))
    return TextModel(model, ModelProfile("qwen3", folder, "qwen3", vocab_size=model.args.vocab_size))


class Ours:
    """The engine stepped in a loop. `lead`: makes its runner one that other processes follow."""

    def __init__(
        self,
        model: TextModel,
        rows: int,
        slack_bytes: int,
        lead: Callable[[ModelRunner], LeadRunner] | None = None,
    ) -> None:
        self.options = EngineOptions(
            memory_bytes=_free_bytes() // 2,
            prefix_cache_bytes=0,
            max_rows=rows,
            prefill_step=2048,
            seed=0,
            slack_bytes=slack_bytes,
        )
        self.tokens: dict[str, list[int]] = defaultdict(list)
        self.engine: Engine = build_engine(model, self.options, self._hear, lead=lead)
        self._count = 0
        self._waited_s = 0.0
        collect = self.engine.runner.collect

        def timed(launched: Any) -> Any:
            start = time.perf_counter()
            result = collect(launched)
            self._waited_s += time.perf_counter() - start
            return result

        self.engine.runner.collect = timed  # type: ignore[method-assign]

    def _hear(self, events: Sequence[TokenEvent], status: EngineStatus) -> None:
        for event in events:
            self.tokens[event.request_id] += event.token_ids

    def run(
        self, prompts: Sequence[Sequence[int]], num_steps: int, sampling: SamplingParams | None = None
    ) -> tuple[float, list[float], float]:
        """(seconds until all rows decode, seconds of each step after that, mean seconds waited in these)."""
        started = time.perf_counter()
        for prompt in prompts:
            self._count += 1
            self.engine.submit(Request(f"r{self._count}", Prompt(tuple(prompt)), num_steps + len(prompts) + 64,
                                       sampling or SamplingParams()))  # fmt: skip
        while any(s.first_token is None for s in self.engine.scheduler.all()):
            self.engine.step()
        for _ in range(8):  # groups are merged in these
            self.engine.step()
        prefilled = time.perf_counter() - started
        times, self._waited_s = [], 0.0
        for _ in range(num_steps):
            times.append(_seconds(self.engine.step))
        waited = self._waited_s / num_steps
        self.engine.cancel_all()
        while self.engine.has_work:
            self.engine.step()
        return prefilled, times, waited


def run_theirs(model: qwen3.Model, prompts: Sequence[list[int]], num_steps: int) -> tuple[float, list[float]]:
    """mlx-lm's BatchGenerator on the same prompts."""
    mx.fast.scaled_dot_product_attention = MLX_ATTENTION
    try:
        return _run_theirs(model, prompts, num_steps)
    finally:
        prompt_attention.install()


def _run_theirs(model: qwen3.Model, prompts: Sequence[list[int]], num_steps: int) -> tuple[float, list[float]]:
    generator = BatchGenerator(
        model, max_tokens=num_steps + 200, completion_batch_size=len(prompts), prefill_batch_size=min(8, len(prompts))
    )
    started = time.perf_counter()
    generator.insert([list(p) for p in prompts])
    seen: set[int] = set()
    while len(seen) < len(prompts):
        _, generated = generator.next()
        seen.update(r.uid for r in generated)
    for _ in range(8):
        generator.next()
    prefilled = time.perf_counter() - started
    times = [_seconds(generator.next) for _ in range(num_steps)]
    generator.close()
    return prefilled, times


def measure(
    name: str,
    bits: int,
    rows: Sequence[int],
    contexts: Sequence[str],
    num_steps: int,
    with_theirs: bool,
    slack_bytes: int,
) -> Iterator[Case]:
    """One case for each number of rows and each context."""
    bandwidth = copy_bandwidth()
    model = make_model(name, bits)
    plain = twin_of(model, bits) if with_theirs else None
    served = as_served(model)
    for num_rows in rows:
        ours = Ours(served, num_rows, slack_bytes)
        for context in contexts:
            found: dict[str, list[Any]] = {"ours": [], "theirs": []}
            error = ""
            for number in range(ROUNDS):
                prompts = prompts_of(context, num_rows, number, model.args.vocab_size)
                found["ours"].append(ours.run(prompts, num_steps))
                if plain is not None and not error:
                    try:
                        found["theirs"].append(run_theirs(plain, prompts, num_steps))
                    except Exception as problem:  # what another library cannot do is a result too
                        error = f"mlx-lm: {type(problem).__name__}: {problem}"
            tokens = sum(map(len, prompts_of(context, num_rows, 0, model.args.vocab_size)))
            floor_s = (bytes_of(model) + kv_bytes(model, tokens)) / bandwidth
            theirs = found["theirs"]
            yield Case(
                name, bits, num_rows, context,
                ours_ms=_median_ms(t for run in found["ours"] for t in run[1]),
                wait_ms=1e3 * statistics.median(run[2] for run in found["ours"]),
                theirs_ms=_median_ms(t for run in theirs for t in run[1]) if theirs else None,
                floor_ms=1e3 * floor_s,
                prefill_ours_s=statistics.median(run[0] for run in found["ours"]),
                prefill_theirs_s=statistics.median(run[0] for run in theirs) if theirs else None,
                error=error,
            )  # fmt: skip
        mx.clear_cache()


def measure_host(num_rows: int = 256, num_steps: int = 30) -> dict[str, float]:
    """Milliseconds a step of the parts that are the host's alone."""
    ours = Ours(as_served(make_model("tiny", 16)), num_rows, 16 << 20)
    runner: Any = ours.engine.runner
    engine, spent = ours.engine, {"plan": 0.0, "sample": 0.0, "commit": 0.0, "publish": 0.0}

    def timed(owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.thread_time()  # its own processor time: others on the machine do not count
            try:
                return inner(*args, **kwargs)
            finally:
                spent[name] += time.thread_time() - start

        setattr(owner, method, call)

    timed(engine.scheduler, "plan", "plan")
    timed(engine.scheduler, "commit", "commit")
    timed(runner._sampler, "sample", "sample")
    timed(engine, "_flush", "publish")
    report = {}
    for kind, sampling in (("greedy", SamplingParams()), ("top_p", SamplingParams(temperature=0.7, top_p=0.95))):
        prompts = [[7 + i] * 8 for i in range(num_rows)]
        run = engine.step
        counted: list[dict[str, float]] = []

        def step(run: Callable[[], None] = run, counted: list[dict[str, float]] = counted) -> None:
            before = dict(spent)
            run()
            counted.append({name: spent[name] - before[name] for name in spent})

        engine.step = step  # type: ignore[method-assign]
        ours.run(prompts, num_steps, sampling)
        engine.step = run  # type: ignore[method-assign]
        steady = counted[-num_steps - 2 : -2]
        for name in spent:
            report[f"{kind}: {name}"] = 1e3 * statistics.median(c[name] for c in steady)
        report[f"{kind}: together"] = 1e3 * statistics.median(sum(c.values()) for c in steady)
    return report


def _free_bytes() -> int:
    from vllm_mlx.models import device

    return device.free_bytes()


def _median_ms(seconds: Iterator[float]) -> float:
    return 1e3 * statistics.median(seconds)


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", default="0.6b,4b,8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--bits", default="16,4")
    parser.add_argument("--rows", default="1,8,32,64")
    parser.add_argument("--contexts", default="512,mixed", help="prompt lengths, or `mixed`")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--alone", action="store_true", help="without mlx-lm")
    parser.add_argument("--host", action="store_true", help="the host's part of a step of 256 rows, and nothing else")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--slack-mib", type=int, default=512, help="spent on padding rather than on groups of rows")
    options = parser.parse_args(argv)
    facts = {"device": str(mx.default_device()), "mlx": mx.__version__,
             "copy_GB_s": copy_bandwidth() / 1e9, "matmul_TFLOP_s": matmul_rate() / 1e12}  # fmt: skip
    print(", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in facts.items()), flush=True)
    host = measure_host()
    print("host, 256 rows, ms a step: " + ", ".join(f"{k} {v:.2f}" for k, v in host.items()), flush=True)
    cases: list[Case] = []
    if not options.host:
        print("| model | bits | rows | context | ours ms | waiting | mlx-lm ms | floor ms | prefill s | mlx-lm's |")
        print("| --- | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
        for name in options.models.split(","):
            for bits in map(int, options.bits.split(",")):
                rows, contexts = [int(n) for n in options.rows.split(",")], options.contexts.split(",")
                for c in measure(name, bits, rows, contexts, options.steps, not options.alone, options.slack_mib << 20):
                    cases.append(c)
                    shown = [c.ours_ms, c.wait_ms, c.theirs_ms, c.floor_ms, c.prefill_ours_s, c.prefill_theirs_s]
                    print(
                        f"| {c.model} | {c.bits} | {c.rows} | {c.context} | "
                        + " | ".join("-" if v is None else f"{v:.2f}" for v in shown)
                        + f" | {c.error}",
                        flush=True,
                    )
                    if options.json:
                        report = {**facts, "host": host, "cases": [asdict(case) for case in cases]}
                        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
