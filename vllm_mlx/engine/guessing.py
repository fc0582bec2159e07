"""Guesses in the runner's steps: which rows may have one, how long it may be, and what became of it.

`speculative.py` guesses and knows what pays; here is what the rows of the decode batch allow. How far a row's layers
can take tokens back is a fact of every rank; on ranks that follow, and where nobody guesses, there is nothing else, and
each question has the answer that there is no guess. Nothing is computed here. MLX thread only.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from typing import Any

from vllm_mlx.engine.decode_batch import DecodeBatch
from vllm_mlx.engine.seat import Seat
from vllm_mlx.engine.sequence import Sequence
from vllm_mlx.engine.speculative import Speculator, StepClock
from vllm_mlx.engine.step import StepPlan

NO_RING = 1 << 30
"""Where no layer has a window: rows may be drafted as far as anybody would."""


class Guessing:
    """`most_draft`: tokens that may be written and taken back in a row; 0 for none.

    `speculator` is None where nobody guesses. `head` is the model, if it has a head that guesses: its `states`
    [R, L, D] are those of its last call. They are to be shown by `saw`.
    """

    def __init__(self, speculator: Speculator | None, model: Any, most_draft: int) -> None:
        self.most_draft = most_draft
        self.speculator = speculator if most_draft else None
        self.head: Any | None = model if self.speculator is not None and self.speculator.wants_states else None
        self._clock = StepClock()

    def bound(self, num_tokens: int) -> None:
        """Other ranks' layers allow no more than this."""
        self.most_draft = min(self.most_draft, num_tokens)
        if not self.most_draft:
            self.speculator = self.head = None

    def bytes_for(self, num_tokens: int) -> int:
        """Device memory that guessing takes for a row of this length."""
        return self.speculator.bytes_for(num_tokens) if self.speculator is not None else 0

    # ── before a step ───────────────────────────────────────────────────────────────────────────────────────────

    def drafts(
        self, seats: SequenceOf[Seat], limits: SequenceOf[int], batch: DecodeBatch | None
    ) -> tuple[tuple[int, ...], ...]:
        """For each seat, all of which stand in the batch, a guess of the tokens behind its next one, at most its limit:
        empty where there is none or where it could not be verified. Nothing at all where nobody guesses."""
        if self.speculator is None or batch is None:
            return ()
        drafts = []
        for seat, limit in zip(seats, limits, strict=True):
            draft: tuple[int, ...] = ()
            limit = min(limit, self._room(seat, batch))
            if limit and seat.known_token is not None:
                draft = self.speculator.draft(seat.sequence, limit, len(seats))
                if draft and seat.sampling.guide is not None:
                    draft = draft[: seat.sampling.guide.num_draftable(draft)]
            drafts.append(draft)
        return tuple(drafts)

    def expects(self, seats: SequenceOf[Seat], batch: DecodeBatch | None) -> bool:
        """Some row will have a guess for its next step, if its token is waited for before that is launched."""
        if self.speculator is None or batch is None:
            return False
        num_rows = len(seats)
        return any(self._room(seat, batch) and self.speculator.expects(seat.sequence, num_rows) for seat in seats)

    def _room(self, seat: Seat, batch: DecodeBatch) -> int:
        """How long the seat's guess may be. Penalties count every token before, and guesses may not stay."""
        if seat.sampling.has_penalties:
            return 0
        return batch.draft_room(seat.sequence.id, self.most_draft if self.most_draft < NO_RING else None)

    # ── after it ────────────────────────────────────────────────────────────────────────────────────────────────

    def verified(self, sequence: Sequence, num_drafted: int, num_kept: int) -> None:
        """What became of a draft."""
        assert self.speculator is not None
        self.speculator.verified(sequence, num_drafted, num_kept)

    def saw(self, sequence: Sequence, start: int, states: Any) -> None:
        """`states` [N, D] stand behind the sequence's tokens [start, start + N), which stay."""
        if self.speculator is not None:
            self.speculator.saw(sequence, start, states)

    def observe(self, plan: StepPlan, num_tokens: int, num_rows: int, num_kept: int) -> None:
        """A step's tokens have come just now: of so many that were computed, these rows keep `num_kept` guesses."""
        if self.speculator is not None and (elapsed_s := self._clock.lap(plan)) is not None:
            self.speculator.observe(num_tokens, num_rows, num_kept, elapsed_s)

    def close(self, request_id: str) -> None:
        """The row is gone."""
        if self.speculator is not None:
            self.speculator.close(request_id)

    def rest(self) -> None:
        """No row is left: the next step does not begin where the last one ended."""
        self._clock.stop()

    def metrics(self) -> Mapping[str, object]:
        return self.speculator.metrics() if self.speculator is not None else {}
