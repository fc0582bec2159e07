"""Which chunks share a forward: every chunk in one pack, little padding."""

from __future__ import annotations

import random

from vllm_mlx.engine.packing import MAX_CHUNK_TOKENS, MAX_PACK_TOKENS, MAX_PADDING, pack_chunks
from vllm_mlx.engine.step import Chunk


def chunk(start: int, length: int, name: str = "r") -> Chunk:
    return Chunk(name, start, start + length, is_last=True)


def test_every_chunk_is_in_one_pack_that_wastes_little() -> None:
    rng = random.Random(1)
    for _ in range(300):
        chunks = [chunk(rng.choice([0, 0, 16, 500]), rng.randrange(1, 400), f"r{i}") for i in range(rng.randrange(20))]
        packs = pack_chunks(chunks)
        assert sorted(c.request_id for pack in packs for c in pack) == sorted(c.request_id for c in chunks)
        for pack in packs:
            longest = max(c.end - c.start for c in pack)
            if len(pack) > 1:
                assert longest <= MAX_CHUNK_TOKENS and len(pack) * longest <= MAX_PACK_TOKENS
                assert len(pack) * longest <= MAX_PADDING * sum(c.end - c.start for c in pack)


def test_a_burst_of_short_prompts_is_one_pack() -> None:
    assert len(pack_chunks([chunk(0, 36 + i % 5, f"r{i}") for i in range(16)])) == 1


def test_long_pasts_are_not_padded_to_by_short_ones() -> None:
    assert len(pack_chunks([chunk(0, 20, "new"), chunk(4000, 20, "old")])) == 2
    assert len(pack_chunks([chunk(4000, 20, "a"), chunk(4000, 21, "b")])) == 1
