"""A measurer whose machine is a formula, so that what is best is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vllm_mlx.tune.search import Knobs


class FakeMachine:
    """`prefill(chunk)`, `rate(rows)` give seconds and tokens a second; guessing costs and spares these factors.

    Every number is multiplied by what the machine happens to be doing: `busy(n)` for the n-th measurement.
    """

    def __init__(self, *, prefill: Callable[[int], float] = lambda chunk: 1.0,
                 rate: Callable[[int], float] = lambda rows: rows * 10.0, copying: float = 3.0, writing: float = 1.0,
                 busy: Callable[[int], float] = lambda number: 1.0, stops_after: int | None = None) -> None:
        self._prefill, self._rate, self._copying, self._writing = prefill, rate, copying, writing
        self._busy, self._stops_after = busy, stops_after
        self.num_measured = 0

    def prefill_s(self, knobs: Knobs) -> float:
        return self._noted(self._prefill(knobs.prefill_step_size))

    def decode_rates(self, rows: Sequence[int]) -> dict[int, float]:
        self._noted(1.0)
        return {n: self._rate(n) for n in rows}

    def copying_s(self, knobs: Knobs, num_rows: int) -> float:
        return self._noted(1.0 if knobs.speculation == "off" else 1 / self._copying)

    def writing_s(self, knobs: Knobs, num_rows: int) -> float:
        return self._noted(1.0 if knobs.speculation == "off" else 1 / self._writing)

    def crowd_s(self, knobs: Knobs, num_requests: int) -> float:
        rows = min(knobs.max_num_seqs, num_requests)
        return self._noted(num_requests / self._rate(rows))

    def _noted(self, seconds: float) -> float:
        self.num_measured += 1
        if self.num_measured == self._stops_after:
            raise KeyboardInterrupt
        return seconds * self._busy(self.num_measured)
