"""What constrained rows cost a batch: `python -m tools.measure_constraints [ROWS] [--size 30m] [--tokenizer FILE]`.

Steps the engine on random weights with a vocabulary of 151,936 tokens, greedy, with no row, one row and all rows held
to a JSON schema: three engines that take turns in short blocks of steps. Prints medians of a step, by the clock and in
processor time (which a busy machine changes little), with their ratios; what a mask takes; and how often the second use
of a schema compiles (it must not). The vocabulary is made of invented words, as many and as long as those of current
models; a real tokenizer.json may be given instead.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from vllm_mlx import blas
from vllm_mlx.bench.main import default_folder
from vllm_mlx.bench.model import SIZES, SYLLABLES, build

VOCAB = 151_936
BLOCKS, BLOCK = 9, 6
SCHEMA = {
    "type": "array",
    "minItems": 1000,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string"},
            "age": {"type": "integer"},
            "tags": {"type": "array", "items": {"type": "string"}},
            "address": {"type": "object", "properties": {"street": {"type": "string"}, "zip": {"type": "string"}},
                        "required": ["street"], "additionalProperties": False},
        },
        "required": ["name", "age", "tags", "address"],
        "additionalProperties": False,
    },
}  # fmt: skip


def tokenizer_json() -> str:
    """A byte-level BPE of invented words, with and without a space before them, and their beginnings."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    rng = random.Random(1)
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    merges: list[tuple[str, str]] = []
    while len(vocab) < VOCAB - 300:
        word = "".join(rng.choice(SYLLABLES) for _ in range(rng.choice((1, 2, 2, 3, 3, 4))))
        word = rng.choice(("Ġ", "Ġ", "", "_", '"')) + (word.capitalize() if rng.random() < 0.2 else word)
        for end in range(2, len(word) + 1):
            if word[:end] not in vocab:
                vocab[word[:end]] = len(vocab)
                merges.append((word[: end - 1], word[end - 1]))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|im_end|>", special=True, normalized=False)])
    return str(tokenizer.to_str())


def build_wide(size: str) -> Path:
    """The benchmark's model with an embedding of the large vocabulary; only its config and weights are used."""
    import numpy as np
    from safetensors.numpy import load_file, save_file

    source = build(default_folder(), size)
    out = default_folder() / f"{source.name}-wide"
    if (out / "complete").exists():
        return out
    shutil.copytree(source, out, dirs_exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "vocab_size": VOCAB}))
    weights = load_file(source / "model.safetensors")
    hidden = config["hidden_size"]
    rng = np.random.default_rng(0)
    weights["model.embed_tokens.weight"] = rng.standard_normal((VOCAB, hidden), dtype=np.float32) * (2 / hidden**0.5)
    save_file(weights, str(out / "model.safetensors"), metadata={"format": "pt"})
    (out / "complete").touch()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=int, nargs="?", default=16)
    parser.add_argument("--size", choices=tuple(SIZES), default="30m")
    parser.add_argument("--tokenizer", type=Path)
    options = parser.parse_args()
    print(blas.load(), flush=True)
    Measurement(options.rows, options.size, options.tokenizer).run()


class Measurement:
    def __init__(self, num_rows: int, size: str, tokenizer: Path | None) -> None:
        from vllm_mlx.generation.grammar import GrammarCompiler  # after the BLAS: these import MLX
        from vllm_mlx.models import loader

        self.num_rows = num_rows
        text = tokenizer.read_text() if tokenizer else tokenizer_json()
        end = max(token["id"] for token in json.loads(text)["added_tokens"] if token["id"] < VOCAB)
        self.compiler = GrammarCompiler(lambda: text, vocab_size=VOCAB, eos_token_ids=[end])
        loaded = loader.load(build_wide(size))
        self.name = f"{size} and an embedding of {VOCAB:,} rows"
        self.model = loaded.model

    def run(self) -> None:
        import mlx.core as mx

        start = time.perf_counter()
        self.compiler.prepare()
        prepared = time.perf_counter()
        grammar = self._compile()
        compiled = time.perf_counter()
        self._compile()
        again = time.perf_counter()
        print(f"{self.num_rows} rows, {self.name}, {mx.default_device()}")
        print(
            f"reading the vocabulary {prepared - start:.2f} s, compiling {(compiled - prepared) * 1e3:.1f} ms, "
            f"the second use {(again - compiled) * 1e3:.2f} ms, compiled {self.compiler.num_compilations} time(s)"
        )
        self._mask_times(grammar)
        engines = {name: self._engine_with(n, grammar)
                   for name, n in {"no row": 0, "1 row": 1, "all rows": self.num_rows}.items()}  # fmt: skip
        clock: dict[str, list[float]] = {name: [] for name in engines}
        busy: dict[str, list[float]] = {name: [] for name in engines}
        order = list(engines)
        for number in range(BLOCKS):
            for name in order[number % 3 :] + order[: number % 3]:
                mx.synchronize()
                started = time.perf_counter(), time.process_time()
                for _ in range(BLOCK):
                    engines[name].step()
                mx.synchronize()
                clock[name].append((time.perf_counter() - started[0]) / BLOCK)
                busy[name].append((time.process_time() - started[1]) / BLOCK)
        for name in engines:
            shown = [f"{name:8s}"]
            for kind, values in (("by the clock", clock), ("of the processor", busy)):
                ratios = statistics.quantiles((a / b for a, b in zip(values[name], values["no row"], strict=True)), n=4)
                shown.append(f"{statistics.median(values[name]) * 1e3:7.1f} ms {kind}, {ratios[1]:.3f} times "
                             f"({ratios[0]:.3f} to {ratios[2]:.3f})")  # fmt: skip
            print("; ".join(shown))

    def _compile(self) -> Any:
        from vllm_mlx.generation.request import OutputFormat

        return self.compiler.output_format(OutputFormat("json_schema", SCHEMA))

    def _mask_times(self, grammar: Any) -> None:
        """Of one row that writes random allowed tokens."""
        import numpy as np

        rng = np.random.default_rng(0)
        constraint = grammar.make()
        times = []
        for _ in range(300):
            start = time.perf_counter()
            mask = constraint.allowed()
            times.append((time.perf_counter() - start) * 1e3)
            allowed = np.nonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))[0]
            constraint.accept(int(rng.choice(allowed)))
        times.sort()
        print(f"a mask: median {times[150]:.3f} ms, 95th percentile {times[285]:.3f} ms, longest {times[-1]:.2f} ms")

    def _engine_with(self, num_constrained: int, grammar: Any) -> Any:
        """An engine with a full batch that has begun to write."""
        from vllm_mlx.engine.assembly import EngineOptions, build_engine
        from vllm_mlx.engine.request import Prompt, Request

        options = EngineOptions(memory_bytes=1 << 30, prefix_cache_bytes=0)
        engine = build_engine(self.model, options, lambda events, status: None)
        for row in range(self.num_rows):
            make = grammar.maker() if row < num_constrained else None
            prompt = Prompt(tuple((row * 997 + i * 31) % VOCAB for i in range(32)))
            engine.submit(Request(f"{row}", prompt, 2 * BLOCKS * BLOCK, make_constraint=make))
        while engine.scheduler.waiting or any(s.num_computed < 33 for s in engine.scheduler.running.values()):
            engine.step()
        return engine


if __name__ == "__main__":
    main()
