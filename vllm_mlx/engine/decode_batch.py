"""Which sequence stands in which row of the batched KV, and how long each is. MLX thread only.

Rows stand in groups of similar length, each group with buffers of its own, so that a short row is not padded to a
long one. A sequence joins as a group of one, with the keys and values it was prefilled into, and nobody else notices.
Groups are merged when their lengths agree well enough, small ones with small ones, so that a row is copied a few times
in its life, not at each change of the batch. A row that leaves is left empty until its group is merged, or has too many
empty rows.

    group 0   row 0  [kkkkkkkkk..]       together at most `MAX_WASTE` times the tokens alive (and a little slack)
              row 1  [kkkkkkk....]
    group 1   row 2  [kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk....]

Models whose layers cannot be called group by group have one group, padded to its longest row.

Where answers may not depend on their company (`invariance.py`) each sequence is a group of its own for good, and one
group of empty rows may fill the step up to a fixed number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm_mlx.engine.kv_batch import BatchCache, grouped_entries
from vllm_mlx.engine.kv_cache import KVSegment, RowCache, StateCheckpoint, capacity_for
from vllm_mlx.models.grouped import Spread

MAX_WASTE = 1.25
# Merging stops below the bound, so that growth does not pass it at once.
MERGE_WASTE = 1.2
# A group is merged with one at most so many times its size, unless there are too many groups; the longer both have
# stood apart, the more times, for by then the copy is worth it.
MAX_SIZE_RATIO = 4
PATIENCE_STEPS = 8
# Where copying is quick beside the launches of another group.
QUICK_COPY_SIZE_RATIO = 64
MANY_GROUPS = 6
# Places that a row's own buffers may have beyond what it would get.
ROOM_SLACK = 8
# More drafts than anybody makes.
MAX_ROOM = 1 << 16


class RowGroup:
    """Rows of similar length in common buffers. A row without a sequence is empty: computed along and thrown away."""

    def __init__(self, like: RowCache) -> None:
        self.cache = BatchCache(like)
        self.rows: list[str | None] = []
        self.lengths: list[int] = []
        self.age = 0

    @classmethod
    def of_nobody(cls, like: RowCache, num_rows: int) -> RowGroup:
        """Empty rows only."""
        group = cls(like)
        group.rows, group.lengths = [None] * num_rows, [0] * num_rows
        group.reserve()
        return group

    @property
    def num_alive(self) -> int:
        return sum(row is not None for row in self.rows)

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @property
    def held_tokens(self) -> int:
        return len(self.rows) * self.cache.num_tokens

    def adopt(self, request_id: str, row: RowCache, length: int) -> None:
        self.rows, self.lengths = [request_id], [length]
        places, most = row.num_places, capacity_for(length)
        # A prompt's buffers were made for it (`RowCache.make_room`): as good as new ones, and no copy.
        self.cache.adopt(row, places if places is not None and length < places <= most + ROOM_SLACK else most)

    def leave(self, index: int) -> None:
        self.rows[index], self.lengths[index] = None, 0

    def reserve(self, num_new: int = 1) -> None:
        """Room for so many more tokens in each row."""
        if self.longest + num_new > self.cache.num_tokens:
            self.cache.reserve(len(self.rows), capacity_for(self.longest + num_new - 1))

    @property
    def fitting_tokens(self) -> int:
        """What `held_tokens` would be after `compact`."""
        return self.num_alive * min(self.cache.num_tokens, capacity_for(self.longest))

    def compact(self) -> None:
        """Drop empty rows, and length that nobody needs; no copy where there is neither."""
        self._drop_empty()
        self.cache.reserve(len(self.rows), min(self.cache.num_tokens, capacity_for(self.longest)))

    def absorb(self, other: RowGroup) -> None:
        """Take over another group's rows, in buffers long enough for both."""
        self._drop_empty()
        other._drop_empty()
        longest = max(self.longest, other.longest)
        capacity = capacity_for(longest)
        # Buffers with half of that room left are kept: one copy fewer of the larger group.
        if (longest + capacity) / 2 <= self.cache.num_tokens <= capacity:
            capacity = self.cache.num_tokens
        self.cache.reserve(len(self.rows), capacity)
        other.cache.reserve(len(other.rows), capacity)
        self.cache.append(other.cache)
        self.rows += other.rows
        self.lengths += other.lengths
        self.age = 0

    def _drop_empty(self) -> None:
        kept = [i for i, row in enumerate(self.rows) if row is not None]
        if len(kept) < len(self.rows):
            self.cache.select(kept, len(kept))
            self.rows = [self.rows[i] for i in kept]
            self.lengths = [self.lengths[i] for i in kept]


class DecodeBatch:
    """All rows that are decoded. `can_group`: the model's layers can be called group by group.

    `is_apart`: groups are never merged. `num_rows`, for these: rows of every step, 0 for as many as there are; no more
    than these may join.
    `slack_tokens` may be wasted beyond the bound, as far as all stays below `most_tokens`: so little memory is not
    worth the time that a further group costs.
    `copies_quickly`: groups of any size are merged at once.
    `waste_ratio`: tokens the buffers hold for each token alive, in the last step.
    """

    def __init__(
        self,
        like: RowCache,
        *,
        can_group: bool,
        slack_tokens: int = 0,
        is_apart: bool = False,
        num_rows: int = 0,
        copies_quickly: bool = False,
        most_tokens: int | None = None,
    ) -> None:
        self._like = like
        self._can_group = can_group
        self._is_apart = is_apart
        self._num_rows = num_rows
        self._slack_tokens = slack_tokens
        self._most_tokens = most_tokens
        self._size_ratio = QUICK_COPY_SIZE_RATIO if copies_quickly else MAX_SIZE_RATIO
        self._groups: list[RowGroup] = []
        self._places: dict[str, tuple[RowGroup, int]] = {}
        self._spreads: list[Spread | None] = []
        self.waste_ratio = 1.0

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._places

    def __len__(self) -> int:
        return len(self._places)

    @property
    def num_rows(self) -> int:
        """Rows computed each step, empty ones included."""
        return sum(len(group.rows) for group in self._groups)

    @property
    def num_groups(self) -> int:
        return len(self._groups)

    @property
    def alive_tokens(self) -> int:
        return sum(sum(group.lengths) for group in self._groups)

    @property
    def held_tokens(self) -> int:
        """Tokens the buffers have room for."""
        return sum(group.held_tokens for group in self._groups)

    @property
    def nbytes(self) -> int:
        return sum(group.cache.nbytes for group in self._groups)

    @property
    def state(self) -> list[Any]:
        return [a for group in self._groups for a in group.cache.state]

    @property
    def entries(self) -> list[Any]:
        """What the model is called with."""
        if len(self._groups) == 1 and self._spreads == [None]:
            return self._groups[0].cache.entries
        return grouped_entries([group.cache for group in self._groups], self._spreads)

    def index(self, request_id: str) -> int:
        """Where the sequence's first token stands among the step's, over all groups."""
        group, row = self._places[request_id]
        place = self._groups.index(group)
        spread = self._spreads[place]
        before = zip(self._groups[:place], self._spreads[:place], strict=True)
        within = row if spread is None else sum(spread.counts[:row])
        return within + sum(len(g.rows) if s is None else s.num_tokens for g, s in before)

    def draft_room(self, request_id: str, ring: int | None) -> int:
        """Tokens that may be written behind the row's next one and taken back. Windows that have gone round write over
        what is still seen, and a group is written as a whole."""
        group, _ = self._places[request_id]
        return MAX_ROOM if ring is None else max(0, ring - group.longest - 1)

    def keep(self, request_id: str, num_tokens: int) -> None:
        """So many of the last step's drafts are the row's own tokens now."""
        if request_id in self._places:
            group, row = self._places[request_id]
            group.lengths[row] += num_tokens

    def join(self, request_id: str, row: RowCache, length: int) -> None:
        """Take over a sequence's cache of `length` tokens."""
        group = RowGroup(self._like)
        group.adopt(request_id, row, length)
        self._groups.append(group)
        self._places[request_id] = group, 0

    def leave(self, request_id: str) -> None:
        """Empty the row; what it held is hidden from now on."""
        group, row = self._places.pop(request_id)
        group.leave(row)
        if not group.num_alive:
            self._groups.remove(group)

    def arrange(self) -> None:
        """Merge groups that fit together; no places change after this until the next step."""
        self._arrange()

    def begin_step(self, request_ids: Sequence[str], num_drafts: Mapping[str, int] | None = None) -> list[int]:
        """Set the positions of a step that gives each of these rows a token, and return every token's.

        Rows that are not named are computed too, but do not move on. Behind a row's token come its drafts, if it has
        any; `keep` says afterwards how many of them stay.
        """
        num_drafts = num_drafts or {}
        positions: list[int] = []
        self._spreads = []
        num_new = []
        for group in self._groups:
            counts = [1 + num_drafts.get(row or "", 0) for row in group.rows]
            num_new.append(max(counts))
            self._spreads.append(Spread(counts) if num_new[-1] > 1 else None)
            group.reserve(num_new[-1])
        self.waste_ratio = self.held_tokens / max(1, self.alive_tokens + len(self))
        for group, spread, num in zip(self._groups, self._spreads, num_new, strict=True):
            group.age += 1
            group.cache.begin(group.lengths, num)
            if spread is None:
                positions += group.lengths
            else:
                positions += [n + i for n, c in zip(group.lengths, spread.counts, strict=True) for i in range(c)]
        for request_id in request_ids:
            group, row = self._places[request_id]
            group.lengths[row] += 1
        return positions

    def segment(self, request_id: str, start: int, end: int) -> KVSegment:
        group, row = self._places[request_id]
        return KVSegment(group.cache.segment_layers(row, start, end))

    def checkpoint(self, request_id: str, length: int) -> StateCheckpoint:
        """The row's state that cannot be sliced, after `length` tokens: its length as of the step just built."""
        group, row = self._places[request_id]
        assert group.lengths[row] == length
        return group.cache.checkpoint(row, length)

    # ── arranging ───────────────────────────────────────────────────────────────────────────────────────────────

    def _arrange(self) -> None:
        """Merge what fits together; give back empty rows and unused length when they cost too much."""
        if self._is_apart:
            if self._num_rows:
                self._fill_up()
            return
        while (pair := self._best_merge()) is not None:
            first, second = pair
            first.absorb(second)
            self._groups.remove(second)
            self._note_places(first)
        # Only as many copies as bring the waste under the bound, those that save most first.
        by_saving = sorted(self._groups, key=lambda group: group.fitting_tokens - group.held_tokens)
        for group in by_saving:
            if self.held_tokens <= self._allowed_tokens(MAX_WASTE) or group.fitting_tokens == group.held_tokens:
                break
            group.compact()
            self._note_places(group)

    def _fill_up(self) -> None:
        """Empty rows behind the others, as many as are missing."""
        self._groups = [group for group in self._groups if group.num_alive]
        missing = self._num_rows - len(self._groups)
        assert missing >= 0, "more sequences than the step has rows"
        if missing:
            self._groups.append(RowGroup.of_nobody(self._like, missing))

    def _note_places(self, group: RowGroup) -> None:
        for row, request_id in enumerate(group.rows):
            if request_id is not None:
                self._places[request_id] = group, row

    def _best_merge(self) -> tuple[RowGroup, RowGroup] | None:
        """The two groups, neighbours in length, whose merging wastes least; None when none should be merged."""
        if len(self._groups) < 2:
            return None
        by_length = sorted(self._groups, key=lambda g: g.longest)
        pairs = list(zip(by_length, by_length[1:], strict=False))
        if not self._can_group:
            return pairs[-1][::-1]
        candidates = [pair for pair in pairs if self._may_merge(*pair)]
        best = min(candidates, key=lambda pair: _merge_waste(*pair), default=None)
        if best is None or self.held_tokens + _merge_waste(*best) > self._allowed_tokens(MERGE_WASTE):
            return None
        return best[::-1]

    def _allowed_tokens(self, waste: float) -> float:
        bound = waste * self.alive_tokens
        if self._most_tokens is None:
            return bound + self._slack_tokens
        return bound + max(0.0, min(self._slack_tokens, self._most_tokens - bound))

    def _may_merge(self, first: RowGroup, second: RowGroup) -> bool:
        small, large = sorted((first.held_tokens, second.held_tokens))
        ratio = self._size_ratio * (1 + min(first.age, second.age) / PATIENCE_STEPS)
        return len(self._groups) > MANY_GROUPS or large <= ratio * small


def _merge_waste(first: RowGroup, second: RowGroup) -> int:
    """Tokens the merged buffers hold beyond what the two hold now."""
    rows = first.num_alive + second.num_alive
    return rows * capacity_for(max(first.longest, second.longest)) - first.held_tokens - second.held_tokens
