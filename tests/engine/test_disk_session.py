"""A conversation that a restart interrupts computes only what is new, on every kind of cache; counted in tokens."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests import tiny_models
from tests.engine.harness import BLOCK, EngineHarness
from vllm_mlx.engine.kv_cache import Quantization
from vllm_mlx.engine.scheduler import FixedChunk
from vllm_mlx.models.loader import load


def words(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(20, 590) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    ("name", "dtype", "bits"),
    [
        ("qwen3", "float32", None),
        ("qwen3", "bfloat16", None),
        ("llama", "float32", 8),
        ("gemma3_text", "float32", None),
        ("qwen3_next", "float32", None),
        ("deepseek_v3", "float32", None),
        ("mamba2", "float32", None),
    ],
)
def test_after_a_restart_a_turn_computes_what_is_new_and_says_the_same(
    name: str,
    dtype: str,
    bits: int | None,
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Heads as wide as a group of quantised values.
    monkeypatch.setitem(
        tiny_models.TEXT, "llama", dict(tiny_models.TEXT["llama"], num_attention_heads=2, num_key_value_heads=1)
    )
    path = folders / name
    model = load(path if path.exists() else tiny_models.build(name, path), dtype=dtype).model
    quantization = Quantization(bits, 32) if bits else None

    def start(disk: Path | None) -> EngineHarness:
        return EngineHarness(model, chunk=64, disk=disk, disk_min_tokens=64, quantization=quantization)

    rng = random.Random(4)
    conversation = words(rng, 500)
    first = start(tmp_path)
    conversation += first.lone(conversation, max_tokens=37, boundaries=(480,)) + words(rng, 45)
    first.stop()

    second = start(tmp_path)
    answer = second.lone(conversation, max_tokens=20)
    computed = second.scheduler.counters.num_prefilled_tokens
    assert computed <= 45 + 2 * BLOCK, f"computed {computed} tokens for 45 new ones"
    assert second.answers["r0"].last.cache.num_cached_tokens >= 500
    second.stop()
    assert answer == start(None).lone(conversation, max_tokens=20)


@pytest.mark.parametrize("name", ["qwen3", "gemma3_text", "qwen3_next"])
def test_a_preempted_row_that_was_swapped_goes_on_where_it_was(name: str, folders: Path, tmp_path: Path) -> None:
    path = folders / name
    model = load(path if path.exists() else tiny_models.build(name, path)).model
    prompt = words(random.Random(5), 150)
    expected = EngineHarness(model).lone(prompt, max_tokens=60)
    harness = EngineHarness(model, disk=tmp_path, disk_min_tokens=10_000, prefix_bytes=1)
    harness.scheduler._chunk_sizer = FixedChunk(32, seconds_per_token=1.0)
    request_id = harness.ask(prompt, max_tokens=60)
    harness.step(40)
    harness.scheduler.preempt(harness.scheduler.running[request_id])
    assert harness.tier is not None and harness.tier.metrics()["disk_cache"]["num_swaps"] == 1
    harness.cache.set_budget(1 << 28)
    before = harness.scheduler.counters.num_prefilled_tokens
    harness.run()
    computed = harness.scheduler.counters.num_prefilled_tokens - before
    assert harness.answers[request_id].tokens == expected
    assert computed <= 2 * BLOCK, f"computed {computed} tokens again"
    harness.stop()
