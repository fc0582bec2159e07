"""The radix tree by itself: what is found, cut, held and dropped. Segments are plain tuples of keys."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vllm_mlx.engine.prefix_cache import PrefixCache

BLOCK = 4


@dataclass(frozen=True)
class Keys:
    keys: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return 10 * len(self.keys)

    def split(self, num_tokens: int) -> tuple[Keys, Keys]:
        return Keys(self.keys[:num_tokens]), Keys(self.keys[num_tokens:])


@dataclass(frozen=True)
class State:
    position: int
    nbytes: int = 7

    def split(self, num_tokens: int):
        raise AssertionError("a checkpoint is never split")


class Tree(PrefixCache):
    """`put` inserts the keys themselves as segment; `found` is what a match gives back."""

    def __init__(self, budget_bytes: int = 100_000, **options) -> None:
        super().__init__(block_size=BLOCK, budget_bytes=budget_bytes, **{"min_checkpoint_gap": 0, **options})
        self.asked: list[tuple[int, int]] = []

    def put(self, key, *, namespace: str = "", state: bool = False) -> int:
        key = tuple(key)

        def make(start: int, end: int) -> Keys:
            self.asked.append((start, end))
            return Keys(key[start:end])

        checkpoint = State(len(key)) if state else None
        stored = self.insert(key, make, checkpoint=checkpoint, namespace=namespace)
        self.check()
        return stored

    def put_with_tail(self, key) -> None:
        self.put(key)
        key = tuple(key)

        def make(start: int, end: int) -> Keys:
            self.asked.append((start, end))
            return Keys(key[start:end])

        self.insert_tail(key, make)
        self.check()

    def found(self, key, *, namespace: str = "", limit: int | None = None) -> int:
        """Length of the usable prefix; the segments must be exactly its keys."""
        lease = self.match(tuple(key), namespace=namespace, limit=limit)
        keys = tuple(k for segment in lease.segments() for k in segment.keys)[: lease.num_tokens]
        assert keys == tuple(key)[: lease.num_tokens]
        self.release(lease)
        self.check()
        return lease.num_tokens


def test_whole_blocks_are_stored_and_found_to_the_token_behind_the_first() -> None:
    tree = Tree()
    assert tree.put(range(10)) == 8
    assert tree.found(range(10)) == 8 and tree.found(range(7)) == 7 and tree.found(range(3)) == 0


def test_a_tail_is_found_until_a_whole_block_takes_its_place() -> None:
    tree = Tree()
    tree.put_with_tail(range(10))
    assert tree.nbytes == 100
    assert tree.found(range(10)) == 10 and tree.found(range(20)) == 10 and tree.found(range(20), limit=9) == 9
    tree.asked.clear()
    tree.put_with_tail(range(10))
    assert tree.asked == []  # there already
    tree.put_with_tail(range(11))
    assert tree.asked == [(8, 11)] and tree.nbytes == 110  # instead of the shorter
    tree.put_with_tail(range(9))
    assert tree.nbytes == 110
    tree.put(range(12))
    assert tree.nbytes == 120 and tree.found(range(20)) == 12


def test_tails_of_several_answers_stand_side_by_side_and_go_first() -> None:
    tree = Tree()
    for last in (50, 60):
        tree.put_with_tail([*range(8), last, last + 1])
    assert tree.found([*range(8), 50, 51, 52]) == 10 and tree.found([*range(8), 60, 61, 62]) == 10
    assert tree.found([*range(8), 50, 99]) == 9
    assert tree.evict(1) == 20 and tree.found([*range(8), 60, 61]) == 8
    assert tree.evict(1000) == 100 and tree.nbytes == 0


def test_a_held_tail_is_neither_evicted_nor_replaced() -> None:
    tree = Tree()
    tree.put_with_tail(range(10))
    lease = tree.match(tuple(range(10)))
    tree.put(range(12))
    assert tree.evict(1000) == 40 and tree.nbytes == 100  # the block beside it goes
    assert tuple(k for segment in lease.segments() for k in segment.keys) == tuple(range(10))
    tree.release(lease)
    assert tree.evict(1000) == 100


def test_a_part_stays_whole_when_its_run_is_cut() -> None:
    tree = Tree()
    tree.put(range(8))
    tree.put(range(24))
    lease = tree.match(tuple(range(10)))
    assert lease.num_tokens == 10
    tree.found(range(20))  # cuts the run that the lease holds the beginning of
    assert tuple(k for segment in lease.segments() for k in segment.keys)[:10] == tuple(range(10))
    tree.release(lease)
    tree.check()
    assert tree.evict(1000) == 240


def test_less_than_a_block_is_not_kept() -> None:
    tree = Tree()
    tree.put_with_tail(range(3))
    assert tree.nbytes == 0 and tree.asked == []


def test_a_match_never_passes_its_limit() -> None:
    tree = Tree()
    tree.put(range(16))
    assert tree.found(range(16), limit=15) == 15 and tree.found(range(16), limit=3) == 0


def test_a_shared_prefix_is_stored_once() -> None:
    tree = Tree()
    tree.put(range(16))
    tree.put([*range(8), *range(100, 108)])
    assert tree.asked == [(0, 16), (8, 16)]  # the second asked for its own part only
    assert tree.nbytes == 10 * 24
    assert tree.found(range(16)) == 16 and tree.found([*range(8), *range(100, 108)]) == 16


def test_a_partial_match_cuts_a_run_without_changing_the_bytes() -> None:
    tree = Tree()
    tree.put(range(16))
    before = tree.nbytes
    assert tree.found([*range(9), 99, 99, 99]) == 9
    assert tree.nbytes == before and sorted(len(n.key) for n in tree.nodes()) == [8, 8]
    assert tree.found(range(16)) == 16


def test_storing_again_asks_for_nothing() -> None:
    tree = Tree()
    tree.put(range(16))
    tree.asked.clear()
    assert tree.put(range(12)) == 12 and tree.asked == []


def test_the_report_of_a_match_is_exact_to_the_token() -> None:
    tree = Tree()
    tree.put(range(16))
    for position in range(16):
        key = [*range(position), 99, *range(position + 1, 16)]
        lease = tree.match(tuple(key))
        assert lease.num_matched == position and lease.num_tokens == (position if position >= BLOCK else 0)
        tree.release(lease)
        assert tree.match_length(tuple(key)) == position


def test_namespaces_never_meet() -> None:
    tree = Tree()
    tree.put(range(8), namespace="alice")
    assert tree.found(range(8), namespace="bob") == 0 and tree.found(range(8)) == 0
    assert tree.found(range(8), namespace="alice") == 8
    assert tree.match_length(tuple(range(8)), namespace="bob") == 0


# ── holding and dropping ────────────────────────────────────────────────────────────────────────────────────────


def test_the_least_recently_used_leaf_goes_first() -> None:
    tree = Tree()
    for start in (0, 100, 200):
        tree.put(range(start, start + 8))
    tree.found(range(8))  # the oldest is used again
    assert tree.evict(1) == 80
    assert tree.found(range(100, 108)) == 0 and tree.found(range(8)) == 8 and tree.found(range(200, 208)) == 8


def test_a_parent_goes_only_after_its_children() -> None:
    tree = Tree()
    tree.put(range(16))
    tree.put([*range(8), *range(100, 108)])
    assert tree.evict(161) == 240  # both leaves, then the trunk
    assert tree.nbytes == 0 and not list(tree.nodes())


def test_a_leased_path_survives_eviction_up_to_the_root() -> None:
    tree = Tree()
    tree.put(range(16))
    tree.put([*range(8), *range(100, 108)])
    lease = tree.match(tuple(range(16)))
    assert tree.clear() == 80
    assert [s.keys for s in lease.segments()] == [tuple(range(8)), tuple(range(8, 16))]
    tree.release(lease)
    assert tree.clear() == 160 and tree.nbytes == 0


def test_a_leased_run_may_be_cut_and_stays_held() -> None:
    tree = Tree()
    tree.put(range(16))
    lease = tree.match(tuple(range(16)))
    tree.put([*range(8), *range(100, 108)])
    assert tree.clear() == 80
    assert tuple(k for s in lease.segments() for k in s.keys) == tuple(range(16))
    tree.release(lease)
    assert tree.clear() == 160


def test_a_lease_is_released_once_however_often_it_is_asked() -> None:
    tree = Tree()
    tree.put(range(8))
    first, second = tree.match(tuple(range(8))), tree.match(tuple(range(8)))
    tree.release(first)
    tree.release(first)
    assert [n.num_locks for n in tree.nodes()] == [1]
    tree.release(second)
    assert [n.num_locks for n in tree.nodes()] == [0]


def test_a_full_cache_makes_room_for_the_new_by_dropping_the_old() -> None:
    tree = Tree(budget_bytes=160)
    tree.put(range(8))
    tree.put(range(100, 108))
    assert tree.put(range(200, 208)) == 8
    assert tree.nbytes == 160 and tree.found(range(8)) == 0 and tree.counters.num_evictions == 1


def test_what_is_being_extended_is_not_dropped_to_make_room() -> None:
    tree = Tree(budget_bytes=160)
    tree.put(range(8))
    tree.put(range(100, 108))
    assert tree.put(range(12)) == 12
    assert tree.found(range(12)) == 12 and tree.found(range(100, 108)) == 0


def test_what_cannot_fit_is_not_stored_and_costs_nobody_their_place() -> None:
    tree = Tree(budget_bytes=160)
    tree.put(range(100, 108))
    assert tree.put(range(40)) == 0
    assert tree.nbytes == 80 and tree.found(range(100, 108)) == 8


def test_a_smaller_budget_holds_at_once_and_again_when_a_lease_ends() -> None:
    tree = Tree()
    tree.put(range(8))
    tree.put(range(100, 108))
    lease = tree.match(tuple(range(8)))
    tree.set_budget(0)
    assert tree.nbytes == 80
    tree.release(lease)
    assert tree.nbytes == 0


# ── checkpoints ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_without_a_checkpoint_a_match_is_not_usable() -> None:
    tree = Tree(needs_checkpoint=True)
    tree.put(range(8))
    lease = tree.match(tuple(range(8)))
    assert lease.num_tokens == 0 and lease.num_matched == 8 and "no checkpoint" in (lease.reason or "")


def test_the_deepest_checkpoint_within_the_match_is_used() -> None:
    tree = Tree(needs_checkpoint=True)
    tree.put(range(8), state=True)
    tree.put(range(16), state=True)
    tree.put(range(24))
    lease = tree.match(tuple(range(24)))
    assert lease.num_tokens == 16 and lease.checkpoint == State(16)
    assert tree.found([*range(12), 99, 99, 99, 99]) == 8


def test_a_limit_inside_a_checkpointed_run_falls_back_to_the_one_before() -> None:
    tree = Tree(needs_checkpoint=True)
    tree.put(range(8), state=True)
    tree.put(range(16), state=True)
    assert tree.found(range(16), limit=15) == 8


def test_checkpoint_bytes_are_counted_and_given_back() -> None:
    tree = Tree(needs_checkpoint=True)
    tree.put(range(8), state=True)
    assert tree.nbytes == 87
    assert tree.clear() == 87 and tree.nbytes == 0


def test_a_checkpoint_that_has_no_room_is_left_out_and_the_run_stays() -> None:
    tree = Tree(budget_bytes=80, needs_checkpoint=True)
    assert tree.put(range(8), state=True) == 8
    assert tree.nbytes == 80 and tree.found(range(8)) == 0


def test_hits_misses_and_cached_tokens_are_counted() -> None:
    tree = Tree()
    tree.put(range(8))
    tree.found(range(8))
    tree.found(range(50, 60))
    counters = tree.counters
    assert (counters.num_hits, counters.num_misses, counters.num_cached_tokens) == (1, 1, 8)


def test_a_block_has_at_least_one_token() -> None:
    with pytest.raises(ValueError, match="block_size"):
        PrefixCache(block_size=0, budget_bytes=1)
