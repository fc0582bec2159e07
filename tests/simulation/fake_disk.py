"""A disk for the simulation: background jobs run when the simulation says, blocks live in a dict that outlasts a
restart, and writes, reads and whole folders fail at random."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from random import Random

import numpy as np

from tests.simulation.fake_model import FakeSegment, FakeState
from vllm_mlx.engine.disk_blocks import DamagedBlock, Packed, Record
from vllm_mlx.engine.disk_folder import FolderFault


@dataclass
class FakeBackground:
    """Jobs in order; `run_some` runs as many as it is told. `wait` runs one, so that a waiting engine gets on."""

    jobs: deque[Callable[[], None]] = field(default_factory=deque)

    def submit(self, job: Callable[[], None]) -> None:
        self.jobs.append(job)

    def notify(self) -> None:
        pass

    def wait(self, timeout_s: float) -> None:
        self.run_some(1)

    def pause(self, seconds: float) -> None:
        pass

    def run_some(self, count: int) -> None:
        while self.jobs and count > 0:
            self.jobs.popleft()()
            count -= 1

    def close(self, timeout_s: float) -> bool:
        self.run_some(len(self.jobs))
        return True


@dataclass
class FakeCodec:
    """Keys and running hashes as int64 arrays."""

    def pack(self, parts: list[tuple[FakeSegment, int, int]]) -> Packed:
        keys: list[int] = []
        for segment, start, end in parts:
            assert 0 <= start < end <= len(segment.keys)
            keys += segment.keys[start:end]
        return Packed((np.array(keys, dtype=np.int64),), "keys")

    def unpack(self, packed: Packed, start: int, end: int) -> FakeSegment:
        assert packed.structure == "keys" and 0 <= start < end <= len(packed.arrays[0])
        return FakeSegment(tuple(packed.arrays[0][start:end].tolist()))

    def pack_state(self, checkpoint: FakeState) -> Packed:
        return Packed((np.array([checkpoint.state, checkpoint.position], dtype=np.int64),), "state")

    def unpack_state(self, packed: Packed, position: int) -> FakeState:
        assert packed.structure == "state" and packed.arrays[0][1] == position
        return FakeState(int(packed.arrays[0][0]), position)


class FakeFolder:
    """`blocks` is what a restart finds. `fault_rate` is the share of operations that fail."""

    def __init__(self, random: Random, *, limit_bytes: int, fault_rate: float) -> None:
        self.random = random
        self.limit_bytes = limit_bytes
        self.fault_rate = fault_rate
        self.blocks: OrderedDict[str, tuple[Record, Packed]] = OrderedDict()
        self.is_open = False

    @property
    def nbytes(self) -> int:
        return sum(packed.nbytes for _, packed in self.blocks.values())

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    def open(self, model: str) -> list[Record]:
        self._may_fail()
        self.is_open = True
        return [record for record, _ in self.blocks.values() if record.model == model]

    def close(self) -> None:
        self.is_open = False

    def put(self, record: Record, packed: Packed) -> tuple[Record, list[Record]]:
        assert self.is_open
        self._may_fail()
        written = replace(record, nbytes=packed.nbytes)
        self.blocks[record.name] = written, packed
        evicted = []
        while self.nbytes > self.limit_bytes:
            evicted.append(self.blocks.popitem(last=False)[1][0])
        return written, evicted

    def read(self, record: Record) -> Packed:
        if record.name not in self.blocks:
            raise FileNotFoundError(record.name)
        if self.random.random() < self.fault_rate:
            raise DamagedBlock("injected")
        return self.blocks[record.name][1]

    def touch(self, names: list[str]) -> None:
        self._may_fail()
        for name in names:
            if name in self.blocks:
                self.blocks.move_to_end(name)

    def discard(self, name: str) -> None:
        self.blocks.pop(name, None)

    def _may_fail(self) -> None:
        if self.random.random() < self.fault_rate:
            self.is_open = False
            raise FolderFault("injected")
