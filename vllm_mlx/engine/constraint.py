"""What steers one row from the host: a grammar's masks, and the cap on reasoning. No MLX, no text; MLX thread only.

A `Guide` joins the two for the sampler. Each step the runner calls

    launch the forward -> prepare_guides(...)   masks are computed while the device works
    sample                                      asks each guide for its mask and its forced token
    collect -> guide.accept(token)              in order, every token of the row

The grammar engine is llguidance; its matchers drop the GIL while they compute. `generation/grammar.py` compiles.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from llguidance import LLExecutor, LLMatcher

from vllm_mlx.engine.markers import Marker, ids_of, match_of
from vllm_mlx.engine.request import Constraint, Request, ThinkingBudget


def mask_of(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Bitmask uint32 with these tokens' bits set."""
    mask = np.zeros((vocab_size + 31) // 32, dtype=np.uint32)
    for token_id in token_ids:
        if 0 <= token_id < vocab_size:
            mask[token_id // 32] |= np.uint32(1 << (token_id % 32))
    return mask


def mask_without(token_ids: Iterable[int], vocab_size: int) -> np.ndarray:
    """Bitmask uint32 with all bits set but these tokens'."""
    return ~mask_of(token_ids, vocab_size)


def is_allowed(mask: np.ndarray | None, token_id: int) -> bool:
    if mask is None:
        return True
    word = token_id // 32
    return word < mask.size and bool(int(mask[word]) >> (token_id % 32) & 1)


class GrammarConstraint:
    """A grammar's state in one sequence: `engine.request.Constraint` over an llguidance matcher of its own.

    Once the grammar is complete and nothing can be added, only stop tokens are allowed. A grammar that cannot go on
    (too complex a state, a token it did not allow) allows nothing and says why in `failure`.
    """

    def __init__(self, matcher: LLMatcher, *, vocab_size: int, stop_token_ids: Iterable[int]) -> None:
        self._matcher = matcher
        self.num_words = (vocab_size + 31) // 32
        self._stop_ids = frozenset(t for t in stop_token_ids if 0 <= t < vocab_size)
        self._stop_mask = mask_of(self._stop_ids, vocab_size)
        self._mask: np.ndarray | None = None
        self._num_after_end = 0
        self.failure: str | None = None
        self._check()

    def allowed(self) -> np.ndarray:
        if self._mask is None:
            self._mask = np.zeros(self.num_words, dtype=np.uint32)
            if self.wants_matcher_mask:
                self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
                self._check()
            elif self.failure is None:
                self._mask = self._stop_mask
        return self._mask

    @property
    def wants_matcher_mask(self) -> bool:
        """The matcher has to compute the next mask (and has not yet)."""
        return self.failure is None and not self.is_finished

    @property
    def has_mask(self) -> bool:
        return self._mask is not None

    @property
    def matcher(self) -> LLMatcher:
        return self._matcher

    def set_mask(self, mask: np.ndarray) -> None:
        """Take a mask computed elsewhere (`prepare_guides`) by this constraint's matcher."""
        self._mask = mask
        self._check()

    def accept(self, token_id: int) -> None:
        self._mask = None
        if self.failure is not None:
            return
        if self.is_finished:
            self._num_after_end += 1
        elif not self._matcher.consume_token(token_id):
            self._check()

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens accepted (drafts that were not kept)."""
        self._mask = None
        from_after_end = min(num_tokens, self._num_after_end)
        self._num_after_end -= from_after_end
        if num_tokens > from_after_end and not self._matcher.rollback(num_tokens - from_after_end):
            self._check()

    def num_accepted_of(self, token_ids: Sequence[int]) -> int:
        """How many of these tokens, in order, the grammar would take from here; changes nothing."""
        if self.failure is not None or self.is_finished:
            return 0
        return self._matcher.validate_tokens(list(token_ids))

    @property
    def is_finished(self) -> bool:
        return self._matcher.is_stopped() and not self._matcher.is_error()

    @property
    def is_complete(self) -> bool:
        """What was generated so far satisfies the grammar, though more might follow."""
        return self._matcher.is_accepting()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = self._matcher.get_error().strip().splitlines()
            self.failure = f"the grammar cannot go on: {reason[0] if reason else 'unknown error'}"
            self._mask = np.zeros(self.num_words, dtype=np.uint32)


class AfterReasoning:
    """A constraint that begins only when the reasoning has ended.

    With the reasoning open everything is allowed up to and including the end marker, but for the end of the answer: it
    would be one without the shape that was asked for (unless the grammar takes an empty one). When it is not open yet
    the model may either open it (its start marker, at the very beginning) or start on the grammar at once.
    """

    def __init__(
        self,
        inner: GrammarConstraint,
        *,
        vocab_size: int,
        start: Marker,
        end: Marker,
        starts_open: bool,
        stop_token_ids: Iterable[int] = (),
    ) -> None:
        self._inner = inner
        self._start = ids_of(start)
        self._end = match_of(end)
        self._vocab_size = vocab_size
        banned = () if inner.is_complete else frozenset(stop_token_ids) - frozenset(ids_of(end))
        self._thinking_mask = mask_without(banned, vocab_size) if banned else None
        self._is_open = starts_open
        self._num_start_matched: int | None = None if starts_open or not self._start else 0
        self._inner_is_alive = True  # false while tokens of a start marker were seen that the grammar would not take
        self._num_inner_accepted = 0

    @property
    def inner(self) -> GrammarConstraint:
        return self._inner

    @property
    def is_in_grammar(self) -> bool:
        """The next mask is the grammar's alone."""
        return not self._is_open and self._num_start_matched is None

    def allowed(self) -> np.ndarray | None:
        if self._is_open:
            return self._thinking_mask
        if self._num_start_matched is None:
            return self._inner.allowed()
        opening = mask_of([self._start[self._num_start_matched]], self._vocab_size)
        return self._inner.allowed() | opening if self._inner_is_alive else opening

    def accept(self, token_id: int) -> None:
        if self._is_open:
            self._is_open = not self._end.feed(token_id)
            return
        if self._num_start_matched is None:
            self._inner.accept(token_id)
            return
        if token_id != self._start[self._num_start_matched]:
            self._num_start_matched = None  # the answer begins without reasoning
            self._inner.accept(token_id)
            return
        self._num_start_matched += 1
        if self._num_start_matched == len(self._start):
            self._is_open, self._num_start_matched = True, None
            if self._num_inner_accepted:
                self._inner.rollback(self._num_inner_accepted)
        elif self._inner_is_alive and is_allowed(self._inner.allowed(), token_id):
            self._inner.accept(token_id)
            self._num_inner_accepted += 1
        else:
            self._inner_is_alive = False

    def rollback(self, num_tokens: int) -> None:
        """Only inside the grammar: drafts are not made across the end of the reasoning."""
        if not self.is_in_grammar:
            raise ValueError("cannot take back tokens outside the grammar")
        self._inner.rollback(num_tokens)

    @property
    def is_finished(self) -> bool:
        return self.is_in_grammar and self._inner.is_finished

    @property
    def failure(self) -> str | None:
        return self._inner.failure


class ThinkingTracker:
    """Counts reasoning tokens on the host and says which token must come once the cap is reached.

    Tokens of the markers are not counted. `forced_ids` may hold words before the end marker; they are reasoning too, so
    the forcing starts that much earlier and the cap holds; a cap with no room for them goes without. An end marker that
    the model has begun is finished, not restarted.
    """

    def __init__(self, budget: ThinkingBudget) -> None:
        self._start = match_of(budget.start)
        self._end = match_of(budget.end)
        self._forced = budget.forced_ids or ids_of(budget.end)
        num_words = _num_before(budget.end, self._forced)
        if num_words is None:
            self._forced, num_words = ids_of(budget.end), 0
        elif num_words > budget.max_tokens:
            self._forced, num_words = self._forced[num_words:], 0
        self._limit = budget.max_tokens - num_words
        self._pending: list[int] = []
        self.is_open = budget.starts_open
        self.num_reasoning = 0

    def forced(self) -> int | None:
        """The token that must come next, if any."""
        if not self._pending and self.is_open and self.num_reasoning >= self._limit:
            self._pending = list(self._end.rest() or self._forced)
        return self._pending[0] if self._pending else None

    def accept(self, token_id: int) -> None:
        if self._pending:
            if token_id == self._pending[0]:
                self._pending.pop(0)
            else:
                self._pending.clear()
        if not self.is_open:
            self.is_open = self._start.feed(token_id)
            return
        self.num_reasoning += 1
        if self._end.feed(token_id):
            self.is_open = False
            self.num_reasoning -= self._end.num_tokens

    @property
    def needs_host_token(self) -> bool:
        """A forced token may be due before the host has read the two tokens that may be in flight."""
        return self.may_force_within(0)

    def may_force_within(self, num_tokens: int) -> bool:
        """A forced token may be due within so many more."""
        return bool(self._pending) or self._limit - self.num_reasoning <= num_tokens + 2


def _num_before(marker: Marker, ids: Sequence[int]) -> int | None:
    """How many of these tokens come before the marker; None when it is not among them."""
    match = match_of(marker)
    for i, token_id in enumerate(ids, start=1):
        if match.feed(token_id):
            return i - match.num_tokens
    return None


class Guide:
    """What the sampler and the runner ask of a row that is steered from the host."""

    def __init__(self, constraint: Constraint | None = None, thinking: ThinkingTracker | None = None) -> None:
        self.constraint = constraint
        self.thinking = thinking
        self._mask: np.ndarray | None = None
        self._is_ready = False

    @classmethod
    def of(cls, request: Request, completion_ids: Sequence[int] = ()) -> Guide | None:
        """The guide a request needs, if any, brought to where its completion stands (after a preemption)."""
        if request.make_constraint is None and request.thinking is None:
            return None
        guide = cls(
            request.make_constraint() if request.make_constraint is not None else None,
            ThinkingTracker(request.thinking) if request.thinking is not None else None,
        )
        for token_id in completion_ids:
            guide.accept(token_id)
        return guide

    @property
    def needs_host_token(self) -> bool:
        return self.constraint is not None or (self.thinking is not None and self.thinking.needs_host_token)

    def prepare(self) -> None:
        """Compute the next mask now; call it after a launch, when the device is busy and the host is not."""
        if not self._is_ready:
            self._is_ready = True
            needs_mask = self.constraint is not None and self.forced() is None
            self._mask = self.constraint.allowed() if needs_mask and self.constraint is not None else None

    def mask(self) -> np.ndarray | None:
        self.prepare()
        return self._mask

    def forced(self) -> int | None:
        return self.thinking.forced() if self.thinking is not None else None

    def num_draftable(self, token_ids: Sequence[int]) -> int:
        """How many of these drafted tokens, in order, could be verified in one step: as far as the grammar takes them,
        and none where a token may have to be forced, or where what was accepted could not be taken back."""
        if self.thinking is not None and self.thinking.may_force_within(len(token_ids)):
            return 0
        if self.constraint is None:
            return len(token_ids)
        grammar = _grammar_of(self.constraint)
        return grammar.num_accepted_of(token_ids) if grammar is not None else 0

    def masks_after(self, token_ids: Sequence[int]) -> list[np.ndarray | None]:
        """The masks behind each of these tokens, which `num_draftable` let pass; the guide stays where it is."""
        self.prepare()
        if self.constraint is None:
            return [None] * len(token_ids)
        masks = []
        for token_id in token_ids:
            self.constraint.accept(token_id)
            masks.append(self.constraint.allowed())
        self.constraint.rollback(len(token_ids))
        return masks

    def accept(self, token_id: int) -> None:
        self._is_ready = False
        self._mask = None
        if self.constraint is not None and not self._is_forced_behind_reasoning(token_id):
            self.constraint.accept(token_id)
        if self.thinking is not None:
            self.thinking.accept(token_id)

    def _is_forced_behind_reasoning(self, token_id: int) -> bool:
        """White space that a cap writes behind the end marker: part of neither the reasoning nor the shape."""
        if isinstance(self.constraint, AfterReasoning) and not self.constraint.is_in_grammar:
            return False
        return self.thinking is not None and not self.thinking.is_open and self.thinking.forced() == token_id

    @property
    def is_finished(self) -> bool:
        """The grammar is complete: nothing but a stop token can follow, so the sequence may end here."""
        return self.constraint is not None and self.constraint.is_finished

    @property
    def failure(self) -> str | None:
        return self.constraint.failure if self.constraint is not None else None


def prepare_guides(guides: Iterable[Guide | None], executor: LLExecutor | None = None) -> None:
    """`Guide.prepare` for a whole batch; with an executor, grammar masks are computed on its threads."""
    todo = [guide for guide in guides if guide is not None]
    if executor is not None:
        _compute_in_parallel([g for guide in todo if (g := _grammar_in(guide)) is not None], executor)
    for guide in todo:
        guide.prepare()


def _grammar_in(guide: Guide) -> GrammarConstraint | None:
    """The grammar constraint whose mask is needed next, if that is what the guide will ask for."""
    grammar = _grammar_of(guide.constraint)
    if grammar is None or grammar.has_mask or guide.forced() is not None:
        return None
    return grammar if grammar.wants_matcher_mask else None


def _grammar_of(constraint: Constraint | None) -> GrammarConstraint | None:
    """The grammar that steers the next token, if one does."""
    if isinstance(constraint, AfterReasoning) and constraint.is_in_grammar:
        constraint = constraint.inner
    return constraint if isinstance(constraint, GrammarConstraint) else None


def _compute_in_parallel(constraints: Sequence[GrammarConstraint], executor: LLExecutor) -> None:
    by_width: dict[int, list[GrammarConstraint]] = {}
    for constraint in constraints:
        by_width.setdefault(constraint.num_words, []).append(constraint)
    for num_words, group in by_width.items():
        if len(group) < 2:
            continue
        masks = np.zeros((len(group), num_words), dtype=np.uint32)
        executor.unsafe_compute_mask_ptr(
            [(c.matcher, i) for i, c in enumerate(group)], masks.ctypes.data, num_words * 4, len(group)
        )
        for constraint, mask in zip(group, masks, strict=True):
            constraint.set_mask(mask)
