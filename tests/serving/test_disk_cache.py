"""Whole servers with a disk cache: a little of what `tools/canary.py` and `tools/kill_writer.py` do for long."""

from __future__ import annotations

from pathlib import Path

import pytest

from tools.canary import canary
from tools.kill_writer import run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


async def test_canaries_stay_with_their_own(folder: Path) -> None:
    counts, wrong = await canary(
        kind="window", minutes=5, num_asked=40, num_clients=8, num_conversations=4, folder=folder
    )
    assert not wrong and counts["asked"] >= 40
    assert counts["with a prefix from the cache"] > 0 and counts["disk: num_written"] > 0


async def test_a_killed_server_leaves_whole_blocks_and_right_hits(folder: Path) -> None:
    counts, problems = await run(rounds=2, kind="window", folder=folder)
    assert not problems and counts["killed"] == 2
