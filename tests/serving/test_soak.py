"""A short soak: streams that leave at random, after which the server holds nothing. `tools/soak.py` runs for hours."""

from __future__ import annotations

from pathlib import Path

import tools.soak


async def test_after_disconnects_and_time_outs_everything_is_back_where_it_was(tmp_path: Path) -> None:
    enough = {"answered": 60, "left": 8}
    finished = await tools.soak.soak(minutes=2, num_streams=16, size="5m", folder=tmp_path, seed=7, enough=enough)
    assert finished.problems == []
    assert all(finished.counts[name] >= count for name, count in enough.items()), finished.counts


async def test_a_row_that_is_still_held_is_a_problem(tmp_path: Path) -> None:
    """The soak must be able to fail: what it asks at the end is compared with zero."""
    soak = tools.soak.Soak(None, 1, 0.0)
    state = {
        "status": {
            "num_running": 1, "num_waiting": 0, "batch_rows": 1, "runtime": {"active_concurrency": 0},
            "cache": {"kv_bytes": 640, "prefix_cache_bytes": 0}, "memory": {"active_gb": 0.1},
            "total_completion_tokens": 0, "num_preemptions": 0,
        },
        "deep": {"runtime": {"permits_held": 2}},
        "health": {"status": "healthy"},
    }  # fmt: skip
    soak._compare(state, state)
    assert len(soak.problems) == 4 and all(p.startswith(("1 ", "640 ")) for p in soak.problems)
    soak.log = tmp_path / "log"
    soak.log.write_text("09:00 INFO fine\n09:01 ERROR   a step failed\n")
    soak._read_log()
    assert "a step failed" in soak.problems[-1]
