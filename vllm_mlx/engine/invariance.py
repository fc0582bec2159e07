"""How a request's numbers are kept independent of its company (--batch-invariant). MLX thread only.

A row's result may depend on how many rows, keys and prompt tokens a kernel is given, because another shape means
another order of additions. So each row of a step has an attention of its own, over its own length, and of an answer
nothing is reused (its keys were computed one at a time, a prompt's in pieces). What else a model needs on this machine
is measured on the model itself, bit for bit, before it serves; the cheapest that holds is taken:

  free      nothing: the kernels compute each row in one order (float32, 4-bit and 16-bit products on a CPU)
  padded    every decode step computes the same number of rows, and prompts are cut at fixed positions: every kernel
            sees the shapes it would see if the request were alone
  single    as `padded` with one row: a step computes its rows one after the other

The idea of fixing shapes rather than kernels is the fallback that "Defeating Nondeterminism in LLM Inference" (Thinking
Machines, 2025) sets beside batch-invariant kernels.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_mlx.engine.decode_batch import DecodeBatch
from vllm_mlx.engine.kv_cache import Layout, RowCache
from vllm_mlx.models.base import LanguageModel

log = logging.getLogger(__name__)

PADDED_ROWS = 16
GRID_TOKENS = 128
_PROBE_LENGTHS = (3, 17, 18, 40, 75, 9, 64, 33, 21, 5, 50, 12, 7, 28, 90)
_PROBE_STEPS = 3


@dataclass(frozen=True, slots=True)
class Invariance:
    """`name` is None where nothing was promised. `num_rows`: rows of every decode step, 0 for as many as there are.
    `grid`: prompt chunks end at its multiples and nowhere else, 0 for anywhere."""

    name: str | None = None
    num_rows: int = 0
    grid: int = 0

    @property
    def is_promised(self) -> bool:
        return self.name is not None

    @property
    def most_rows(self) -> int | None:
        """Sequences that can be computed together; None for any number."""
        return self.num_rows if self.num_rows > 1 else None

    @property
    def note(self) -> str:
        """What an operator should know of it."""
        if not self.grid:
            return "--batch-invariant computes attention row by row; all else of this model may be batched as it is."
        cut = f"prompts are computed and reused in pieces of {self.grid} tokens"
        if self.num_rows == 1:
            return f"--batch-invariant computes this model's rows one after the other, and {cut}."
        return f"--batch-invariant computes {self.num_rows} rows in every step, never more, and {cut}."


FREE = Invariance("free")
PADDED = Invariance("padded", PADDED_ROWS, GRID_TOKENS)
SINGLE = Invariance("single", 1, GRID_TOKENS)


def choose(model: LanguageModel, layout: Layout, *, can_batch: bool, can_group: bool) -> Invariance:
    """The cheapest way in which a row beside others equals the row alone on this model and machine."""
    if not (can_batch and can_group):
        return SINGLE
    probe = Probe(model, layout)
    is_cpu = mx.default_device().type != mx.gpu  # a GPU chooses other kernels for other numbers of rows
    if is_cpu and probe.ignores_chunks() and probe.agrees(num_rows=0):
        return FREE
    return PADDED if probe.agrees(num_rows=PADDED_ROWS) else SINGLE


class Probe:
    """Random prompts, decoded a few steps alone and together. Same numbers on every run."""

    def __init__(self, model: LanguageModel, layout: Layout) -> None:
        self._model = model
        self._layout = layout
        draw = np.random.default_rng(0)
        self._prompts = [draw.integers(0, model.profile.vocab_size, n).tolist() for n in _PROBE_LENGTHS]
        self._answers = draw.integers(0, model.profile.vocab_size, (len(_PROBE_LENGTHS), _PROBE_STEPS))

    def agrees(self, *, num_rows: int) -> bool:
        """Whether rows decoded together, padded to `num_rows`, give the bits of each row decoded alone."""
        together = self._decode(range(len(self._prompts)), num_rows)
        for index in range(len(self._prompts)):
            if not np.array_equal(self._decode([index], num_rows)[0], together[index]):
                log.debug("row %d of %d differs from itself alone", index, len(self._prompts))
                return False
        return True

    def ignores_chunks(self) -> bool:
        """Whether a prompt computed in pieces gives the bits of the prompt computed at once."""
        long = [index for index, prompt in enumerate(self._prompts) if len(prompt) > 60]
        wholes = {index: self._decode([index], 0)[0] for index in long}
        return all(
            np.array_equal(self._decode([index], 0, chunk=chunk)[0], whole)
            for index, whole in wholes.items()
            for chunk in (16, 48)
        )

    def _decode(self, indices: Sequence[int], num_rows: int, chunk: int = 512) -> list[np.ndarray]:
        """Logits [steps, V] of each of these prompts, all decoded in one batch."""
        batch = DecodeBatch(self._layout.new_row(), can_group=True, is_apart=True, num_rows=num_rows)
        for index in indices:
            batch.join(str(index), self._prefill(self._prompts[index], chunk), len(self._prompts[index]))
        steps = []
        for step in range(_PROBE_STEPS):
            names = [str(index) for index in indices]
            batch.arrange()
            positions = batch.begin_step(names)
            tokens = np.zeros((batch.num_rows, 1), dtype=np.int32)
            rows = [batch.index(name) for name in names]
            tokens[rows, 0] = self._answers[list(indices), step]
            logits = self._model.decode(mx.array(tokens), positions, batch.entries, [None] * batch.num_rows)
            mx.eval(logits, batch.state)
            steps.append(np.array(logits.astype(mx.float32))[rows])
        return list(np.stack(steps, axis=1))

    def _prefill(self, prompt: Sequence[int], chunk: int) -> RowCache:
        row = self._layout.new_row()
        for start in range(0, len(prompt), chunk):
            tokens = mx.array(prompt[start : start + chunk], dtype=mx.int32)[None]
            self._model.prefill(tokens, start, row.entries, None, {})
            mx.eval(row.state)
        return row
