"""A step with guesses in it: its tokens, and the rows that sample behind each. MLX thread only."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import mlx.core as mx

from vllm_mlx.engine.sampler import SamplingRow


def with_drafts(tokens: mx.array, drafts: SequenceOf[tuple[int, ...]]) -> mx.array:
    """int32: each of `tokens`, followed by its drafts."""
    order, place = [], len(drafts)
    for i, draft in enumerate(drafts):
        order += [i, *range(place, place + len(draft))]
        place += len(draft)
    guesses = mx.array([token for draft in drafts for token in draft], dtype=mx.int32)
    return mx.concatenate([tokens, guesses])[mx.array(order, dtype=mx.uint32)]


def sampling_rows(row: SamplingRow, draft: tuple[int, ...]) -> list[SamplingRow]:
    """The row itself, and the row as it will be behind each drafted token."""
    if not draft:
        return [row]
    guide = row.guide
    masks = guide.masks_after(draft) if guide is not None else [None] * len(draft)
    return [row, *(row.ahead(i, mask) for i, mask in enumerate(masks, start=1))]
