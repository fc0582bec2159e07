"""What the disk tier knows to be on disk, in memory: runs that lead from one point of a hash chain to another. No MLX.

The runs of all conversations form a graph whose points are hash-chain links; a prompt can be restored up to any point
that its own links reach from the root, if a whole-state checkpoint is there or none is needed. MLX thread.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os.path import commonprefix

from vllm_mlx.engine.disk_blocks import KEY_BYTES, Record, chain, root_key
from vllm_mlx.engine.prefix_cache import Node


@dataclass(frozen=True, slots=True)
class Found:
    """The runs that lead to `target` tokens of a prompt, and the state kept there where one is needed.

    The last run may go on behind the target.
    """

    target: int = 0
    runs: tuple[Record, ...] = ()
    state: Record | None = None


class DiskIndex:
    """Records of one model. `grain`: runs are cut at multiples of it, so that different prompts cut alike."""

    def __init__(self, model: str, *, block_size: int, grain: int, needs_checkpoint: bool) -> None:
        self.model = model
        self.block_size = block_size
        self.grain = max(grain // block_size, 1) * block_size
        self.needs_checkpoint = needs_checkpoint
        self._runs: dict[bytes, dict[bytes, Record]] = {}
        self._states: dict[bytes, Record] = {}

    def __bool__(self) -> bool:
        return bool(self._runs)

    def replace(self, records: Iterable[Record]) -> None:
        self._runs.clear()
        self._states.clear()
        for record in records:
            self.add(record)

    def add(self, record: Record) -> None:
        if record.kind == "state":
            self._states[record.end_key] = record
        else:
            self._runs.setdefault(record.start_key, {})[record.end_key] = record

    def remove(self, record: Record) -> None:
        if record.kind == "state":
            self._states.pop(record.end_key, None)
        elif (runs := self._runs.get(record.start_key)) is not None:
            runs.pop(record.end_key, None)
            if not runs:
                del self._runs[record.start_key]

    def __contains__(self, record: Record) -> bool:
        if record.kind == "state":
            return record.end_key in self._states
        return record.end_key in self._runs.get(record.start_key, {})

    # ── looking up ──────────────────────────────────────────────────────────────────────────────────────────────

    def links(self, key: Sequence[int], namespace: str) -> list[bytes]:
        """The hash chain of `key`, root first: link i stands after i blocks."""
        root = root_key(namespace)
        return [root, *chain(root, key, self.block_size)]

    def find(self, key: Sequence[int], namespace: str, limit: int) -> Found:
        """The deepest usable point of `key`: within `limit` for a state; where all can be sliced, it may be behind."""
        if root_key(namespace) not in self._runs:
            return Found()
        links = self.links(key, namespace)
        came_by = self.reach(links, limit if self.needs_checkpoint else len(key))
        block = self.block_size
        usable = (p for p in came_by if not self.needs_checkpoint or links[p // block] in self._states)
        target = max(usable, default=0)
        if self.needs_checkpoint:
            return Found(target, route(came_by, target), self._states[links[target // block]] if target else None)
        return self._and_a_part(Found(target, route(came_by, target)), links)

    def _and_a_part(self, found: Found, links: Sequence[bytes]) -> Found:
        """With the beginning of a run that the prompt leaves half way, where there is one."""
        block = self.block_size
        ours = b"".join(links[found.target // block + 1 : (found.target + self.grain) // block + 1])
        best, num_blocks = None, 0
        for run in self._runs.get(links[found.target // block], {}).values():
            agreed = len(commonprefix([run.links, ours])) // KEY_BYTES
            if agreed > num_blocks:
                best, num_blocks = run, agreed
        return found if best is None else Found(found.target + num_blocks * block, (*found.runs, best))

    def reach(self, links: Sequence[bytes], limit: int) -> dict[int, Record]:
        """Positions up to `limit` that runs on disk lead to, each with the run that ends there."""
        block = self.block_size
        came_by: dict[int, Record] = {}
        todo = [0]
        while todo:
            position = todo.pop()
            for record in self._runs.get(links[position // block], {}).values():
                end = record.end
                is_ours = end <= limit and end // block < len(links) and links[end // block] == record.end_key
                if is_ours and end not in came_by:
                    came_by[end] = record
                    todo.append(end)
        return came_by

    # ── what a path of the tree, or a row, is written as ────────────────────────────────────────────────────────

    def path_links(self, path: Sequence[Node]) -> list[bytes]:
        """The hash chain along nodes from the root's child on, root first. Each node's part is made once."""
        links = [root_key(root.namespace)] if (root := path[0].parent) is not None else []
        for node in path:
            if not node.links:
                node.links = tuple(chain(links[-1], node.key, self.block_size))
            links += node.links
        return links

    def missing_runs(self, links: Sequence[bytes], targets: Iterable[int]) -> Iterator[Record]:
        """Runs, cut at multiples of the grain, that have to be written until all targets can be reached."""
        reached = {0, *self.reach(links, max(targets, default=0))}
        for target in sorted(targets):
            start = max(p for p in reached if p <= target)
            while start < target:
                end = min(target, (start // self.grain + 1) * self.grain)
                block = self.block_size
                first, last = start // block, end // block
                inner = b"".join(links[first + 1 : last + 1])
                yield Record(self.model, "kv", start, end, links[first], links[last], links=inner)
                reached.add(end)
                start = end

    def state_at(self, links: Sequence[bytes], position: int) -> Record:
        link = links[position // self.block_size]
        return Record(self.model, "state", position, position, link, link)

    def on_the_way(self, links: Sequence[bytes], target: int) -> list[Record]:
        """What is on disk of a path, up to the deepest point of it within `target`, states included."""
        came_by = self.reach(links, target)
        states = [self._states.get(links[p // self.block_size]) for p in came_by]
        return [*route(came_by, max(came_by, default=0)), *(state for state in states if state is not None)]


def route(came_by: dict[int, Record], target: int) -> tuple[Record, ...]:
    """The runs that lead from the root to `target`."""
    runs: list[Record] = []
    while target:
        runs.append(came_by[target])
        target = came_by[target].start
    return tuple(runs[::-1])
