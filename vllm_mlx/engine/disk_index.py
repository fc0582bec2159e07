"""What the disk tier knows to be on disk, in memory: runs that lead from one point of a hash chain to another. No MLX.

The runs of all conversations form a graph whose points are hash-chain links; a prompt can be restored up to any point
that its own links reach from the root, if a whole-state checkpoint is there or none is needed. MLX thread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from vllm_mlx.engine.disk_blocks import Record, chain, root_key
from vllm_mlx.engine.prefix_cache import Node


@dataclass(frozen=True, slots=True)
class Found:
    """The runs that lead to `target` tokens of a prompt, and the state kept there where one is needed."""

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
        runs: list[Record] = []
        position = target
        while position:
            runs.append(came_by[position])
            position = came_by[position].start
        state = self._states[links[target // block]] if self.needs_checkpoint and target else None
        return Found(target, tuple(runs[::-1]), state)

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

    # ── what a node, or a row, is written as ────────────────────────────────────────────────────────────────────

    def node_links(self, node: Node) -> tuple[bytes, ...]:
        """Hash chain of the node's blocks, made once and kept with it."""
        if not node.links:
            node.links = tuple(chain(self._link_before(node), node.key, self.block_size))
        return node.links

    def node_runs(self, node: Node) -> Iterator[Record]:
        """The runs a node is written as."""
        links = (self._link_before(node), *self.node_links(node))
        return self.cut(node.start, node.end, lambda position: links[(position - node.start) // self.block_size])

    def node_state(self, node: Node) -> Record:
        link = self.node_links(node)[-1]
        return Record(self.model, "state", node.end, node.end, link, link)

    def row_runs(self, links: Sequence[bytes], start: int, end: int) -> Iterator[Record]:
        return self.cut(start, end, lambda position: links[position // self.block_size])

    def cut(self, start: int, end: int, link: Callable[[int], bytes]) -> Iterator[Record]:
        """[start, end) cut at multiples of the grain."""
        while start < end:
            stop = min(end, (start // self.grain + 1) * self.grain)
            yield Record(self.model, "kv", start, stop, link(start), link(stop))
            start = stop

    def node_records(self, node: Node) -> Iterator[Record]:
        """What is on disk of a node."""
        yield from (record for record in self.node_runs(node) if record in self)
        if (state := self._states.get(self.node_links(node)[-1])) is not None:
            yield state

    def _link_before(self, node: Node) -> bytes:
        parent = node.parent
        assert parent is not None
        return root_key(parent.namespace) if parent.parent is None else self.node_links(parent)[-1]
