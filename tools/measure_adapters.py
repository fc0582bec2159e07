"""What LoRA adapters cost a decode step: `python -m tools.measure_adapters [--rows 16] [--adapters 8]`.

Random weights of the benchmark's 30M Qwen3, random adapters on attention and MLP layers, greedy. The three sides take
turns in every round: no adapter in use, one adapter for all rows, and rows spread over all adapters.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from vllm_mlx import blas

KEYS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    print(blas.load())

    import mlx.core as mx  # after the BLAS

    from vllm_mlx.bench.model import build
    from vllm_mlx.engine.assembly import EngineOptions, build_engine
    from vllm_mlx.engine.request import Prompt, Request
    from vllm_mlx.models.adapters import linear_layers
    from vllm_mlx.models.loader import load

    with tempfile.TemporaryDirectory() as scratch:
        base = build(Path(scratch) / "base")
        model = load(base).model
        weights = {}
        for path, place in linear_layers(model._model):
            if path.rsplit(".", 1)[1] in KEYS:
                num_out, num_in = place.module.weight.shape
                weights[f"model.{path}.lora_a"] = mx.random.normal((num_in, options.rank)) * 0.02
                weights[f"model.{path}.lora_b"] = mx.random.normal((options.rank, num_out)) * 0.02
        folder = Path(scratch) / "adapter"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"scale": 1.0}}))
        mx.save_safetensors(str(folder / "adapters.safetensors"), weights)
        names = [f"a{i}" for i in range(options.adapters)]
        for name in names:
            model.adapters.load(name, folder)

    engine = build_engine(model, EngineOptions(memory_bytes=4 << 30, prefix_cache_bytes=0), lambda events, status: None)
    count = 0

    def rate(adapter_of: list[str]) -> float:
        """Tokens a second of a burst, from when all rows decode to the end."""
        nonlocal count
        for i, adapter in enumerate(adapter_of):
            count += 1
            prompt = Prompt(tuple((7 * i + j) % 8000 + 10 for j in range(24)))
            engine.submit(Request(f"r{count}", prompt, options.tokens, adapter=adapter))
        while engine.num_decoding < len(adapter_of):
            engine.step()
        before, start = engine.status().num_completion_tokens, time.process_time()
        while engine.has_work:
            engine.step()
        return (engine.status().num_completion_tokens - before) / (time.process_time() - start)

    sides = {
        "none": [""] * options.rows,
        "one for all": [names[0]] * options.rows,
        f"{options.adapters} mixed": [names[i % len(names)] for i in range(options.rows)],
    }
    rates: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(options.rounds + 1):
        for side, adapter_of in sides.items():
            rates[side].append(rate(adapter_of))
    print(f"{options.rows} rows, rank {options.rank}, all {len(KEYS)} projections; tokens a CPU second, medians")
    for side, found in rates.items():
        kept = found[1:]  # the first round warms up
        pairs = [a / b for a, b in zip(kept, rates["none"][1:], strict=True)]
        print(f"  {side:12} {statistics.median(kept):7.0f}   {statistics.median(pairs):.2f} of none")


if __name__ == "__main__":
    main()
