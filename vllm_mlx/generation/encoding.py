"""Texts to vectors and pairs of texts to scores: tokens on a worker thread, slices of similar length on the MLX thread.

Knows the models by the small protocol below; `models.encoder.EncoderModel` fits. Event loop, but for what is handed to
a worker.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from vllm_mlx.errors import InvalidRequest
from vllm_mlx.generation.oneshot import OneShots, Pace
from vllm_mlx.generation.token_rows import DEFAULT_INSTRUCTION, cut_text, judged_rows, pair_rows, text_rows
from vllm_mlx.models.token_row import TokenRow


class Encoder(Protocol):
    """A model that reads rows of tokens once."""

    @property
    def kind(self) -> str: ...
    @property
    def tokenizer(self) -> Any: ...
    @property
    def profile(self) -> Any: ...
    @property
    def max_tokens(self) -> int: ...
    @property
    def dimensions(self) -> int: ...
    @property
    def has_sigmoid(self) -> bool: ...

    @property
    def compute(self) -> Any:
        """Rows to a float32 array whose first axis is the rows. MLX thread."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """`values`: a row of float32 for each input, in their order. `num_tokens` were computed, padding not counted."""

    values: np.ndarray
    num_tokens: int
    num_truncated: int = 0


@dataclass(eq=False)
class EncodingService:
    """One model's jobs."""

    oneshots: OneShots
    encoder: Encoder
    max_length: int | None = None
    refuses_overflow: bool = False
    pace: Pace = field(init=False)

    def __post_init__(self) -> None:
        self.pace = Pace(self.oneshots.slice_s)
        self.max_tokens = min(self.encoder.max_tokens, self.max_length or self.encoder.max_tokens)

    async def embed(
        self, inputs: Sequence[str | Sequence[int]], *, dimensions: int | None = None, max_tokens: int | None = None
    ) -> Computed:
        """A unit vector for each text or row of token ids.

        `dimensions` cuts vectors (and makes them unit vectors again), which serves models trained for it;
        `max_tokens` cuts inputs, whatever the server's policy on long ones.
        """
        size = self.encoder.dimensions
        if dimensions is not None and not 1 <= dimensions <= size:
            raise InvalidRequest(
                f"'dimensions' must lie between 1 and {size}, the size of this model's vectors.",
                param="dimensions",
                code="invalid_value",
            )
        limit = min(self.max_tokens, max_tokens or self.max_tokens)
        refuses = self.refuses_overflow and max_tokens is None
        rows, num_truncated = await self.oneshots.in_worker(
            lambda: text_rows(self.encoder, inputs, limit, refuses_longer=refuses)
        )
        vectors = await self._compute(rows)
        if dimensions is not None and dimensions < size:
            vectors = vectors[:, :dimensions]
            vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
        return Computed(vectors, sum(map(len, rows)), num_truncated)

    async def score(
        self,
        pairs: Sequence[tuple[str, str]],
        *,
        instruction: str | None = None,
        max_tokens_per_document: int | None = None,
    ) -> Computed:
        """The raw score (before any sigmoid) of each pair of query and document. Long pairs are cut."""
        if instruction is not None and self.encoder.kind != "generative":
            raise InvalidRequest(
                "This model takes no instruction; leave 'instruction' out.", param="instruction", code="invalid_value"
            )

        def prepare() -> list[TokenRow]:
            cut = [(query, cut_text(self.encoder, document, max_tokens_per_document)) for query, document in pairs]
            if self.encoder.kind == "generative":
                return judged_rows(self.encoder, cut, self.max_tokens, instruction or DEFAULT_INSTRUCTION)
            return pair_rows(self.encoder, cut, self.max_tokens)

        rows = await self.oneshots.in_worker(prepare)
        return Computed(await self._compute(rows), sum(map(len, rows)))

    async def _compute(self, rows: Sequence[TokenRow]) -> np.ndarray:
        """Slices of rows of similar length, so that little is padded, each as large as the pace allows."""
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results: list[Any] = [None] * len(rows)
        while order:
            count = self.pace.take([len(rows[i]) for i in order])
            taken, order = order[:count], order[count:]
            batch = [rows[i] for i in taken]
            values, seconds = await self.oneshots.slice(lambda batch=batch: self.encoder.compute(batch))  # type: ignore[misc]
            self.pace.observe(count * len(batch[-1]), seconds)
            for i, value in zip(taken, values, strict=True):
                results[i] = value
        return np.stack(results)


def sigmoid(raw: np.ndarray) -> np.ndarray:
    """Scores between 0 and 1, without overflow."""
    return 0.5 * (1.0 + np.tanh(0.5 * raw.astype(np.float64)))
