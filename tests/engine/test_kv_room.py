"""Buffers made for a whole prompt: nothing is copied while it grows, when it is loaded, or when its row joins."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import KVCache

from vllm_mlx.engine.decode_batch import DecodeBatch
from vllm_mlx.engine.kv_cache import AttentionRow, Quantization, RowCache, capacity_for

NUM_TOKENS = 300


def kv(num_tokens: int, seed: int) -> mx.array:
    return mx.random.normal((1, 2, num_tokens, 64), key=mx.random.key(seed))


def filled(cache: RowCache, first: int, num_tokens: int) -> None:
    for row in cache.rows:
        assert isinstance(row, AttentionRow)
        row.update_and_fetch(kv(num_tokens, first), kv(num_tokens, first + 1))


@pytest.mark.parametrize("quantization", [None, Quantization(8)])
def test_a_prompt_in_chunks_stays_in_the_buffers_it_began_in(quantization):
    cache = RowCache([KVCache(), KVCache()], quantization)
    cache.make_room(capacity_for(NUM_TOKENS))
    for first in range(0, NUM_TOKENS, 100):
        filled(cache, first, 100)
        assert cache.num_places == capacity_for(NUM_TOKENS)
    keys, _ = cache.rows[0].planes()
    plain = RowCache([KVCache(), KVCache()], quantization)
    for first in range(0, NUM_TOKENS, 100):
        filled(plain, first, 100)
    assert all(mx.array_equal(a, b) for a, b in zip(keys, plain.rows[0].planes()[0], strict=True))

    batch = DecodeBatch(RowCache([KVCache(), KVCache()], quantization), can_group=True)
    batch.join("a", cache, NUM_TOKENS)
    batch.arrange()
    assert batch.held_tokens == capacity_for(NUM_TOKENS)
    assert [a.shape[2] for a in batch.state] == [capacity_for(NUM_TOKENS)] * len(batch.state)
    got = batch.segment("a", 0, NUM_TOKENS).layers[0][0]
    assert all(mx.array_equal(a, b) for a, b in zip(got, keys, strict=True))


def test_a_row_without_room_is_cut_to_what_it_needs():
    cache = RowCache([KVCache()])
    filled(cache, 0, 30)  # the first buffer has a whole step of places
    assert cache.num_places == AttentionRow.step
    batch = DecodeBatch(RowCache([KVCache()]), can_group=True)
    batch.join("a", cache, 30)
    assert batch.held_tokens == capacity_for(30)


def test_a_loaded_prefix_leaves_room_for_what_follows():
    source = RowCache([KVCache()])
    filled(source, 0, 64)
    row = AttentionRow()
    row.room = 100
    row.load([source.segment(0, 32).layers[0], source.segment(32, 64).layers[0]], 64)
    assert row.offset == 64 and row.buffers()[0][0].shape[2] == 100
    assert mx.array_equal(row.planes()[0][0], source.rows[0].planes()[0][0])
    before = row.planes()[1][0]
    row.update_and_fetch(kv(10, 7), kv(10, 8))
    assert row.buffers()[0][0].shape[2] == 100 and mx.array_equal(row.planes()[1][0][:, :, :64], before)


def test_of_the_last_segment_only_what_the_lease_covers_is_taken():
    source = RowCache([KVCache()])
    filled(source, 0, 64)
    row = AttentionRow()
    row.load([source.segment(0, 32).layers[0], source.segment(32, 64).layers[0]], 41)
    assert row.offset == 41 and row.buffers()[0][0].shape[2] == 41
    assert mx.array_equal(row.planes()[0][0], source.rows[0].planes()[0][0][:, :, :41])


@pytest.mark.parametrize("copies_quickly, most_tokens, num_groups", [
    (False, None, 2),  # a row of 8 beside one of 200: not before both have stood apart for a while
    (True, None, 1),
    (True, 100_000, 1),
    (True, 300, 2),  # padding the short one would take more than there is
])  # fmt: skip
def test_short_rows_join_long_ones_at_once_where_copies_are_quick_and_memory_allows(
    copies_quickly, most_tokens, num_groups
):
    batch = DecodeBatch(
        RowCache([KVCache()]), can_group=True, slack_tokens=1000, copies_quickly=copies_quickly, most_tokens=most_tokens
    )
    for name, length in (("short", 8), ("long", 200)):
        cache = RowCache([KVCache()])
        filled(cache, 0, length)
        batch.join(name, cache, length)
    batch.arrange()
    assert batch.num_groups == num_groups
