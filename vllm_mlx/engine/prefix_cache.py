"""KV kept for reuse: a radix tree over blocks of tokens, evicted by bytes, least recently used first. No MLX here.

A node holds a run of whole blocks; its `segment` is the KV of exactly these tokens (opaque here, sliceable), and its
`checkpoint`, if any, the whole state of layers that cannot be sliced (sliding window, recurrent) at the node's end.

    root ── [system prompt ........] ─┬─ [question A, answer A ...] ── [end]
              segment, checkpoint     └─ [question B ..]

Nodes begin at block boundaries. What an ended sequence leaves behind its last whole block is a leaf of its own, a
*tail*, until whole blocks take its place. A match returns the longest *usable* prefix: where every layer is sliceable
all whole blocks that agree and the beginning of one block or tail behind them, so that a prompt that comes again
computes its last token only; else the deepest checkpoint. A lease locks the matched path up to the root; a locked node
is never evicted. Trees of different namespaces (API keys, adapters) never meet. Idea: SGLang's RadixAttention (Zheng
et al., 2024); checkpoints as in llama.cpp.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from vllm_mlx.engine.step import CacheReport


class Segment(Protocol):
    """KV of a run of tokens, or a whole-state checkpoint (then never split)."""

    @property
    def nbytes(self) -> int: ...

    def split(self, num_tokens: int) -> tuple[Segment, Segment]:
        """The first `num_tokens` and the rest, each owning its memory."""
        ...


@dataclass(eq=False)
class Node:
    """A run of blocks under its parent, or a tail. `end` is the number of tokens from the root to the end of the run.

    `num_uses` counts the prompts that matched it. `links` (hashes of all tokens up to each block's end) and `is_saved`
    are notes of the disk tier; `namespace` is set on roots.
    """

    key: tuple[int, ...]
    end: int
    parent: Node | None
    segment: Segment | None = None
    checkpoint: Segment | None = None
    children: dict[tuple[int, ...], Node] = field(default_factory=dict)
    num_locks: int = 0
    last_used: int = 0
    num_uses: int = 0
    namespace: str = ""
    links: tuple[bytes, ...] = ()
    is_saved: bool = False

    @property
    def start(self) -> int:
        return self.end - len(self.key)

    @property
    def nbytes(self) -> int:
        return (self.segment.nbytes if self.segment else 0) + (self.checkpoint.nbytes if self.checkpoint else 0)

    def path(self) -> Iterator[Node]:
        """This node, its parent, and so on; the root is left out."""
        node: Node | None = self
        while node is not None and node.parent is not None:
            yield node
            node = node.parent


@dataclass(eq=False)
class Lease:
    """A hold on a matched prefix. `num_tokens` may be used; `num_matched` is how far the tokens agreed.

    The tokens behind `node`, if any, are the beginning of `part`.
    """

    node: Node
    num_tokens: int
    num_matched: int
    reason: str | None = None
    part: Node | None = None
    is_released: bool = False

    def segments(self) -> list[Segment]:
        """Segments of the usable prefix, in order; of the last, only what is left of `num_tokens` may be used."""
        found = [n.segment for n in self.node.path() if n.segment is not None]
        found.reverse()
        if self.part is not None:
            # The part may have been cut since it was locked.
            first = next(n.segment for n in self.part.path() if n.start == self.node.end)
            assert first is not None
            found.append(first)
        return found

    def held(self) -> Iterator[Node]:
        """The locked nodes."""
        return (self.part or self.node).path()

    @property
    def checkpoint(self) -> Segment | None:
        return self.node.checkpoint


class Listener(Protocol):
    """Is told what happens to nodes: the disk tier. Must not change the tree."""

    def stored(self, node: Node) -> None:
        """The node is new, or has a new checkpoint."""
        ...

    def used(self, node: Node) -> None:
        """A prompt matched up to the end of the node; `num_uses` of its path are counted already."""
        ...


@dataclass
class CacheCounters:
    num_hits: int = 0
    num_misses: int = 0
    num_cached_tokens: int = 0
    num_evictions: int = 0
    num_diverged: int = 0
    num_without_checkpoint: int = 0


class PrefixCache:
    """`needs_checkpoint`: the model has layers that cannot be sliced, so only checkpointed ends are usable.

    Checkpoints on one path that are nearer to each other than `min_checkpoint_gap` tokens are the first to be thinned.
    """

    def __init__(
        self, *, block_size: int, budget_bytes: int, needs_checkpoint: bool = False, min_checkpoint_gap: int = 512
    ) -> None:
        if block_size < 1:
            raise ValueError("block_size is at least 1")
        self.block_size = block_size
        self.budget_bytes = budget_bytes
        self.needs_checkpoint = needs_checkpoint
        self.min_checkpoint_gap = min_checkpoint_gap
        self.nbytes = 0
        self.counters = CacheCounters()
        self.listener: Listener | None = None
        self._roots: dict[str, Node] = {}
        self._clock = itertools.count(1)

    # ── looking up ──────────────────────────────────────────────────────────────────────────────────────────────

    def match(
        self, key: tuple[int, ...], *, namespace: str = "", limit: int | None = None, is_use: bool = True
    ) -> Lease:
        """Lock and return the longest usable prefix of `key`, at most `limit` tokens. A miss is a lease of 0 tokens.

        Without `is_use` it is not counted: the caller says `count_use` once it really takes the prefix.
        """
        limit = len(key) if limit is None else min(limit, len(key))
        node, num_matched = self._walk(self._root(namespace), key)
        part = None
        usable_end = min(num_matched, limit) // self.block_size * self.block_size
        while node.end > usable_end and node.start >= usable_end and node.parent is not None:
            node = node.parent
        if node.end > usable_end:
            if self.needs_checkpoint:
                assert node.parent is not None
                node = node.parent
            else:
                node = self._cut(node, usable_end)
        reason = None
        if self.needs_checkpoint:
            deepest = node
            while node.parent is not None and node.checkpoint is None:
                node = node.parent
            if node is not deepest or num_matched - node.end > self.block_size:
                reason = f"no checkpoint between token {node.end} and the end of the match at {num_matched}"
        elif 0 < node.end < min(num_matched, limit):  # less than a block is not worth a lease
            part = self._part_behind(node, key[node.end : limit])
        num_tokens = node.end if part is None else min(num_matched, limit)
        lease = self._lock(Lease(node, num_tokens, num_matched, reason, part))
        if is_use:
            self.count_use(lease)
        return lease

    def count_use(self, lease: Lease) -> None:
        """A prompt takes what the lease holds, or has to do without."""
        if not lease.num_tokens:
            self.counters.num_misses += 1
            return
        self.counters.num_hits += 1
        self.counters.num_cached_tokens += lease.num_tokens
        for node in lease.node.path():
            node.num_uses += 1
        if self.listener is not None:
            self.listener.used(lease.node)

    def pin(self, key: tuple[int, ...], *, namespace: str = "") -> Lease:
        """Lock what is stored of `key` as whole nodes, usable or not, without counting it as a use."""
        node, num_matched = self._walk(self._root(namespace), key)
        if node.end > num_matched and node.parent is not None:
            node = node.parent
        return self._lock(Lease(node, node.end, num_matched))

    def _lock(self, lease: Lease) -> Lease:
        now = next(self._clock)
        for held in lease.held():
            held.num_locks += 1
            held.last_used = now
        return lease

    def _part_behind(self, node: Node, rest: tuple[int, ...]) -> Node:
        """The child that agrees longest with `rest`; some child does."""
        alike = (child for child in node.children.values() if child.key[0] == rest[0])
        return max(alike, key=lambda child: common_prefix(child.key[: self.block_size], rest))

    def match_length(self, key: tuple[int, ...], *, namespace: str = "", usable_only: bool = False) -> int:
        """How far `key` agrees with what is stored, in tokens, or how much of it could be used; changes nothing."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        node, num_matched = self._walk(root, key)
        if not usable_only:
            return num_matched
        if not self.needs_checkpoint:
            return num_matched // self.block_size * self.block_size
        return next((n.end for n in node.path() if n.checkpoint is not None and n.end <= num_matched), 0)

    def release(self, lease: Lease) -> None:
        """End the hold; doing it twice does nothing."""
        if lease.is_released:
            return
        lease.is_released = True
        for node in lease.held():
            assert node.num_locks > 0, "released a node that nobody holds"
            node.num_locks -= 1
        if self.nbytes > self.budget_bytes:  # the budget shrank while this was held
            self.evict(self.nbytes - self.budget_bytes)

    # ── storing ─────────────────────────────────────────────────────────────────────────────────────────────────

    def insert(
        self,
        key: tuple[int, ...],
        make_segment: Callable[[int, int], Segment],
        *,
        checkpoint: Segment | None = None,
        namespace: str = "",
    ) -> int:
        """Store whole blocks of `key`; `make_segment(start, end)` is called once for the part not stored yet.

        `checkpoint` is the state at the end of `key`, whose length then is a whole number of blocks. Returns the
        number of tokens now stored for `key` in whole blocks (less than asked where the budget has no room).
        """
        length = len(key) // self.block_size * self.block_size
        key = key[:length]
        if not length:
            return 0
        node, matched = self._walk(self._root(namespace), key)
        matched = matched // self.block_size * self.block_size
        if node.end > matched:
            node = self._cut(node, matched) if matched > node.start else (node.parent or node)
        now = next(self._clock)
        for used in node.path():
            used.last_used = now
        if node.end < length:
            node = self._append(node, key[node.end :], make_segment, now)
        if checkpoint is not None and node.end == length and node.checkpoint is None:
            self._set_checkpoint(node, checkpoint)
        return node.end

    def insert_tail(
        self, key: tuple[int, ...], make_segment: Callable[[int, int], Segment], *, namespace: str = ""
    ) -> None:
        """Store what stands behind the last whole block of `key`, if all before it is stored, and nothing that begins
        with the same."""
        start = len(key) // self.block_size * self.block_size
        node, matched = self._walk(self._root(namespace), key)
        if 0 < start <= matched < len(key) and node.end == start:
            self._append(node, key[start:], make_segment, next(self._clock))

    def _set_checkpoint(self, node: Node, checkpoint: Segment) -> None:
        if self._make_room(checkpoint.nbytes, keep=node):
            node.checkpoint = checkpoint
            self.nbytes += checkpoint.nbytes
            self._thin(node)
            if self.listener is not None:
                self.listener.stored(node)

    def _thin(self, newest: Node) -> None:
        """Drop checkpoints on the way to the newest that lie closer together the further back they are.

        Between two kept ones the distance is at least half of what the later is from the end, so a conversation of n
        tokens keeps about log n of them. Branch points and locked ends stay, and so does the last before the newest:
        an answer that comes back in other tokens than it was made of still finds the end of its prompt.
        """
        kept, is_last_before = newest.end, True
        for node in list(newest.path())[1:]:
            if node.checkpoint is None:
                continue
            is_branch = len(node.children) > 1 or (node.num_locks and not node.children)
            older = next((n.end for n in node.path() if n is not node and n.checkpoint is not None), 0)
            if is_last_before or is_branch or kept - older > (newest.end - kept) // 2 + self.min_checkpoint_gap:
                kept, is_last_before = node.end, False
                continue
            self.nbytes -= node.checkpoint.nbytes
            node.checkpoint = None

    def _append(self, parent: Node, key: tuple[int, ...], make: Callable[[int, int], Segment], now: int) -> Node:
        segment = make(parent.end, parent.end + len(key))
        if not self._make_room(segment.nbytes, keep=parent):
            return parent
        for tail in [t for t in parent.children.values() if self._is_tail(t) and t.key == key[: len(t.key)]]:
            if not tail.num_locks:
                self._drop(tail)
        child = Node(key, parent.end + len(key), parent, segment, last_used=now)
        parent.children[key[: self.block_size]] = child
        self.nbytes += segment.nbytes
        if self.listener is not None and not self._is_tail(child):
            self.listener.stored(child)
        return child

    def _is_tail(self, node: Node) -> bool:
        return len(node.key) < self.block_size

    # ── giving back ─────────────────────────────────────────────────────────────────────────────────────────────

    def evict(self, num_bytes: int) -> int:
        """Drop unlocked leaves, least recently used first, until `num_bytes` are free; returns the bytes freed."""
        freed = 0
        heap = [(leaf.last_used, id(leaf), leaf) for leaf in self._leaves() if not leaf.num_locks]
        heapq.heapify(heap)
        while heap and freed < num_bytes:
            _, _, leaf = heapq.heappop(heap)
            freed += leaf.nbytes
            self.counters.num_evictions += 1
            parent = self._drop(leaf)
            if parent.parent is not None and not parent.children and not parent.num_locks:
                heapq.heappush(heap, (parent.last_used, id(parent), parent))
        return freed

    def _drop(self, leaf: Node) -> Node:
        """Take a leaf out of the tree; returns its parent."""
        parent = leaf.parent
        assert parent is not None and not leaf.children and not leaf.num_locks
        self.nbytes -= leaf.nbytes
        del parent.children[leaf.key[: self.block_size]]
        leaf.parent = None
        return parent

    def clear(self) -> int:
        """Drop everything that is not locked."""
        return self.evict(self.nbytes)

    def set_budget(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        if self.nbytes > budget_bytes:
            self.evict(self.nbytes - budget_bytes)

    # ── the tree ────────────────────────────────────────────────────────────────────────────────────────────────

    def nodes(self) -> Iterator[Node]:
        """All nodes but the roots, in no order."""
        todo = list(self._roots.values())
        while todo:
            node = todo.pop()
            todo.extend(node.children.values())
            if node.parent is not None:
                yield node

    def check(self) -> None:
        """Assert what must always hold: bytes counted are bytes held, runs are whole blocks, locks nest."""
        held = 0
        for node in self.nodes():
            held += node.nbytes
            assert node.key and node.start % self.block_size == 0, "a run begins at a block"
            assert len(node.key) % self.block_size == 0 or (self._is_tail(node) and not node.children)
            assert node.parent is not None and node.start == node.parent.end
            assert node.parent.parent is None or node.parent.num_locks >= max(
                (c.num_locks for c in node.parent.children.values()), default=0
            ), "a parent is locked whenever its child is"
        assert held == self.nbytes, f"counted {self.nbytes} bytes, held {held}"
        assert self.nbytes <= max(self.budget_bytes, 0) or any(n.num_locks for n in self.nodes())

    def _leaves(self) -> Iterator[Node]:
        return (node for node in self.nodes() if not node.children)

    def _root(self, namespace: str) -> Node:
        if namespace not in self._roots:
            self._roots[namespace] = Node((), 0, None, namespace=namespace)
        return self._roots[namespace]

    def _walk(self, node: Node, key: tuple[int, ...]) -> tuple[Node, int]:
        """The deepest node that `key` enters by a whole block, and the number of tokens that agree: perhaps inside that
        node, or in a block or tail behind it."""
        position = 0
        while position < len(key):
            block = key[position : position + self.block_size]
            child = node.children.get(block) if len(block) == self.block_size else None
            if child is None:
                return node, position + self._partial(node, block)
            agreed = common_prefix(child.key, key, position)
            position += agreed
            node = child
            if agreed < len(child.key):
                break
        return node, position

    def _partial(self, node: Node, rest: tuple[int, ...]) -> int:
        """Tokens of `rest` that agree with some child's first block."""
        # Comparing the first token first: a system prompt may have thousands of conversations behind it.
        return max((common_prefix(block, rest) for block in node.children if block[0] == rest[0]), default=0)

    def _cut(self, node: Node, position: int) -> Node:
        """Split `node` at `position` (a block boundary inside its run); returns the upper half."""
        assert node.parent is not None and node.segment is not None
        assert node.start < position < node.end and position % self.block_size == 0
        size = position - node.start
        before = node.segment.nbytes
        first, second = node.segment.split(size)
        upper = Node(
            node.key[:size], position, node.parent, first, None, {}, node.num_locks, node.last_used, node.num_uses,
            links=node.links[: size // self.block_size], is_saved=node.is_saved,
        )  # fmt: skip
        node.links = node.links[size // self.block_size :]
        node.parent.children[upper.key[: self.block_size]] = upper
        node.key, node.parent, node.segment = node.key[size:], upper, second
        upper.children[node.key[: self.block_size]] = node
        self.nbytes += first.nbytes + second.nbytes - before
        return upper

    def _make_room(self, num_bytes: int, *, keep: Node) -> bool:
        if num_bytes > self.budget_bytes:
            return False
        excess = self.nbytes + num_bytes - self.budget_bytes
        if excess <= 0:
            return True
        keep_path = list(keep.path())
        for node in keep_path:
            node.num_locks += 1
        self.evict(excess)
        for node in keep_path:
            node.num_locks -= 1
        return self.nbytes + num_bytes <= self.budget_bytes


def common_prefix(run: tuple[int, ...], key: tuple[int, ...], offset: int = 0) -> int:
    """Length of the common prefix of `run` and `key[offset:]`."""
    length = min(len(run), len(key) - offset)
    if run[:length] == key[offset : offset + length]:
        return length
    low, high = 0, length
    while low < high:  # bisect: comparing tuple slices runs in C
        middle = (low + high + 1) // 2
        if run[low:middle] == key[offset + low : offset + middle]:
            low = middle
        else:
            high = middle - 1
    return low


def report_lease(num_tokens: int, lease: Lease | None) -> CacheReport:
    """How much of a prompt came from the cache, and where it stopped agreeing with what was there."""
    if lease is None:
        return CacheReport(miss_reason="the prefix cache is not used")
    reason = lease.reason
    if reason is None and lease.num_matched < num_tokens - 1:
        reason = f"token {lease.num_matched} is the first that differs from every stored prefix"
    return CacheReport(lease.num_tokens, lease.num_matched, reason)
