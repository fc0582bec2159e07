"""The estimate of a chunk's activations: deeper chunks are smaller, and the answer is the largest that fits."""

from __future__ import annotations

import json
from pathlib import Path

from vllm_mlx.models.activations import ActivationCost, read_activation_cost


def cost(chunk: int, context: int, activations: ActivationCost) -> int:
    return chunk * (activations.per_token + activations.per_pair * (context + chunk))


def test_the_largest_chunk_that_fits_is_found_and_shrinks_with_depth() -> None:
    activations = ActivationCost(per_token=10_000, per_pair=64)
    sizes = [activations.tokens_within(100_000_000, context) for context in (0, 10_000, 100_000)]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] >= 1
    for size, context in zip(sizes, (0, 10_000, 100_000), strict=True):
        assert cost(size, context, activations) <= 100_000_000 < cost(size + 1, context, activations)


def test_a_config_gives_bytes_a_token_and_a_pair_and_an_empty_one_no_bound(tmp_path: Path) -> None:
    text = {"hidden_size": 1000, "intermediate_size": 3000, "num_attention_heads": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": text}))
    activations = read_activation_cost(tmp_path, value_bytes=2)
    assert activations.per_pair == 2 * 2 * 8 and activations.per_token == 2 * (8 * 1000 + 3 * 4000)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert read_activation_cost(tmp_path, value_bytes=2).tokens_within(1, 1 << 20) >= 1 << 20
