from __future__ import annotations

from dataclasses import dataclass

import pytest

from vllm_mlx.engine.media_cache import MediaCache


@dataclass(frozen=True)
class Blob:
    nbytes: int


def test_features_are_found_by_content() -> None:
    cache: MediaCache[Blob] = MediaCache(budget_bytes=100)
    blob = Blob(10)
    cache.put(b"a", blob)
    assert cache.get(b"a") is blob
    assert cache.get(b"b") is None
    assert (cache.num_hits, cache.num_misses) == (1, 1)


def test_least_recently_used_features_are_dropped_first() -> None:
    cache: MediaCache[Blob] = MediaCache(budget_bytes=30)
    for key in (b"a", b"b", b"c"):
        cache.put(key, Blob(10))
    cache.get(b"a")
    cache.put(b"d", Blob(10))
    assert cache.get(b"b") is None
    assert all(cache.get(key) is not None for key in (b"a", b"c", b"d"))
    assert cache.nbytes == 30


def test_bytes_are_counted_once_when_content_is_put_again() -> None:
    cache: MediaCache[Blob] = MediaCache(budget_bytes=30)
    cache.put(b"a", Blob(10))
    cache.put(b"a", Blob(20))
    assert (cache.nbytes, len(cache)) == (20, 1)


def test_features_larger_than_the_budget_are_not_kept_and_push_nothing_out() -> None:
    cache: MediaCache[Blob] = MediaCache(budget_bytes=30)
    cache.put(b"a", Blob(30))
    cache.put(b"huge", Blob(31))
    assert cache.get(b"huge") is None
    assert cache.get(b"a") is not None


def test_a_smaller_budget_drops_at_once() -> None:
    cache: MediaCache[Blob] = MediaCache(budget_bytes=30)
    for key in (b"a", b"b", b"c"):
        cache.put(key, Blob(10))
    cache.resize(15)
    assert (cache.nbytes, len(cache)) == (10, 1)
    cache.clear()
    assert (cache.nbytes, len(cache)) == (0, 0)


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="negative"):
        MediaCache[Blob](budget_bytes=-1)
