"""Claims about where the tokens of a pack stand, for models that make their own position ids."""

from __future__ import annotations

from types import SimpleNamespace

import mlx.core as mx
import pytest

from vllm_mlx.engine.kv_batch import GroupSlice
from vllm_mlx.models.grouped import Spread


@pytest.mark.parametrize(("offset", "counts", "positions"), [
    (5, (2, 2), [5, 6, 5, 6]),  # rows that begin alike have one offset for all
    (0, (1, 3), [0, 0, 1, 2]),
    (0, (1, 1, 1), [0, 0, 0]),
    (mx.array([4, 7]), (2, 1), [4, 5, 7]),
])
def test_positions_count_on_from_each_rows_start(offset, counts, positions):
    group = GroupSlice(0, sum(counts), SimpleNamespace(offset=offset), Spread(counts))
    assert group.positions.tolist() == positions
