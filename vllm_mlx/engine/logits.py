"""Arithmetic on logits: penalties, biases, masks, exponentials, preselection, log-probabilities.

Whole batches at a time, lazily: nothing here evaluates an array or reads one on the host. It knows rows of numbers, not
sequences; `sampler.py` decides what is applied to whom. MLX thread.

A banned token has a logit of about BANNED rather than minus infinity, so that masks can be added and multiplied, which
on the CPU backend is ten times cheaper than `mx.where`. The order in which a logit is changed:

    penalties (repetition, presence, frequency) -> bias and min_tokens bans -> grammar mask
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from vllm_mlx.models import row_kernels

BANNED = -3.0e38
BANNED_BELOW = -1.0e37  # no model means a logit like this; whatever lies below may not be sampled

_LOG2_E = 1.4426950408889634
_ROUNDING_MAGIC = 12582912.0  # 1.5 * 2**23: adding it leaves the rounded integer in the low bits of the float
_EXP2_POLYNOMIAL = (1.3266970e-3, 9.6754597e-3, 5.5507426e-2, 2.4022122e-1, 6.9314695e-1, 1.0)  # 2**f, |f| <= 0.5


def repetition_and_additive_penalties(
    logits: mx.array,
    counts: mx.array,
    unrepeated: mx.array,
    presence: mx.array,
    frequency: mx.array,
) -> mx.array:
    """Apply the three penalties to [R, V].

    `counts` [R, V] are completion counts (OpenAI's additive penalties); `unrepeated` [R, V] is 1 / repetition_penalty
    at tokens seen in prompt or completion and 1 elsewhere; `presence` and `frequency` are [R, 1].
    """
    positive = mx.maximum(logits, 0.0)
    logits = positive * unrepeated + (logits - positive) / unrepeated
    return logits - (counts * frequency + mx.minimum(counts, 1.0) * presence)


def add_at(logits: mx.array, rows: Sequence[int], token_ids: Sequence[int], values: Sequence[float]) -> mx.array:
    """Add values at (row, token) pairs; a pair may occur more than once."""
    if not token_ids:
        return logits
    row_index = mx.array(np.asarray(rows, dtype=np.uint32))
    token_index = mx.array(np.asarray(token_ids, dtype=np.uint32))
    return logits.at[row_index, token_index].add(mx.array(np.asarray(values, dtype=np.float32)))


def apply_bitmasks(logits: mx.array, masks: Sequence[np.ndarray | None]) -> mx.array:
    """Ban, in each row, the tokens whose bit is not set; None leaves a row as it is.

    A mask is uint32 [ceil(vocab / 32)], least significant bit first; tokens past its end are banned.
    """
    num_rows, vocab = logits.shape
    is_banned = np.zeros((num_rows, vocab), dtype=np.uint8)
    for row, mask in enumerate(masks):
        if mask is not None:
            is_set = np.unpackbits(np.ascontiguousarray(mask, dtype="<u4").view(np.uint8), bitorder="little")[:vocab]
            is_banned[row, : is_set.size] = is_set ^ 1
            is_banned[row, is_set.size :] = 1
    return logits + mx.array(is_banned).astype(mx.float32) * BANNED


def exp_nonpositive(x: mx.array) -> mx.array:
    """e**x for float32 x <= 0, relative error under 1e-5 (mostly rounding of x), exactly 0 from about x = -88 down.

    MLX's CPU `exp` takes 10 ns an element or more, which at 16 rows of a 150k vocabulary is most of a sampling step.
    Our kernel takes a tenth of it; where it is missing, a dozen vectorised operations take a third. Elsewhere, and for
    small arrays, it is plain `mx.exp`.
    """
    if row_kernels.are_available():
        return row_kernels.exp(x)
    return mx.exp(x) if mx.default_device() != mx.Device(mx.cpu) or x.shape[-1] < 1024 else _exp_by_bits(x)


def _exp_by_bits(x: mx.array) -> mx.array:
    # 2**y = 2**n * 2**f with n = round(y). n + 127 >= 0 becomes the exponent bits; n = -127 gives exactly zero.
    y = mx.maximum(x * _LOG2_E, -127.0)
    shifted = y + _ROUNDING_MAGIC
    f = y - (shifted - _ROUNDING_MAGIC)
    scale = mx.view((mx.view(shifted, mx.uint32) << 23) + (127 << 23), mx.float32)
    power = f * _EXP2_POLYNOMIAL[0] + _EXP2_POLYNOMIAL[1]
    for coefficient in _EXP2_POLYNOMIAL[2:]:
        power = power * f + coefficient
    return power * scale


def greedy(logits: mx.array) -> tuple[mx.array, mx.array]:
    """uint32 [R] the likeliest tokens of [R, V], and bool [R] whether a row holds NaN or infinity."""
    places = row_kernels.argmax(logits)
    if places is not None:
        return mx.maximum(places, 0).astype(mx.uint32), places < 0
    return mx.argmax(logits, axis=-1).astype(mx.uint32), are_broken(logits)


def are_broken(logits: mx.array) -> mx.array:
    """bool [R]: whether a row holds NaN or infinity; minus infinity bans a token and is none."""
    total = row_sum(logits if logits.dtype != mx.float16 else logits.astype(mx.float32))[:, 0]
    return mx.logical_or(mx.isnan(total), total == mx.inf)


def pad_vocab(x: mx.array, multiple: int, value: float) -> mx.array:
    """[R, V] padded on the right so that V is a multiple."""
    missing = -x.shape[-1] % multiple
    return mx.pad(x, [(0, 0), (0, missing)], constant_values=value) if missing else x


def row_max(x: mx.array) -> mx.array:
    """[R, V] -> [R, 1]. In two stages, the first along columns, which the CPU backend vectorises."""
    if x.shape[-1] % 32:
        return x.max(-1, keepdims=True)
    return x.reshape(x.shape[0], 32, -1).max(1).max(-1, keepdims=True)


def row_sum(x: mx.array) -> mx.array:
    """[R, V] -> [R, 1], in two stages for speed and accuracy."""
    if x.shape[-1] % 32:
        return x.sum(-1, keepdims=True)
    return x.reshape(x.shape[0], 32, -1).sum(1).sum(-1, keepdims=True)


def top_sorted(x: mx.array, num: int) -> tuple[mx.array, mx.array]:
    """The `num` largest of each row of float32 [R, V], descending, and their token ids (uint32).

    The largest `num` elements lie in the `num` blocks (of 32 tokens) with the largest maxima, so only these are sorted.
    """
    num_rows, vocab = x.shape
    num = min(num, vocab)
    block = 32
    num_blocks = -(-vocab // block)
    if num * 2 >= num_blocks:
        return _top_of(x, None, num)
    x = pad_vocab(x, block, BANNED)
    columns = x.reshape(num_rows, block, num_blocks)  # block j holds tokens j, j + num_blocks, ...
    chosen = mx.argpartition(-columns.max(1), num - 1, axis=-1)[:, :num].astype(mx.uint32)
    values = mx.take_along_axis(columns, chosen[:, None, :], axis=-1).reshape(num_rows, block * num)
    token_ids = chosen[:, None, :] + (mx.arange(block, dtype=mx.uint32) * num_blocks)[None, :, None]
    return _top_of(values, token_ids.reshape(num_rows, block * num), num)


def _top_of(values: mx.array, token_ids: mx.array | None, num: int) -> tuple[mx.array, mx.array]:
    negated = -values
    if num < values.shape[-1]:
        picked = mx.argpartition(negated, num - 1, axis=-1)[:, :num]
        inner = mx.argsort(mx.take_along_axis(negated, picked, axis=-1), axis=-1)
        order = mx.take_along_axis(picked, inner, axis=-1)
    else:
        order = mx.argsort(negated, axis=-1)
    top_ids = order if token_ids is None else mx.take_along_axis(token_ids, order, axis=-1)
    return mx.take_along_axis(values, order, axis=-1), top_ids.astype(mx.uint32)


def log_sum_exp(logits: mx.array) -> mx.array:
    """[R, V] float32 -> [R, 1]."""
    top = row_max(logits)
    return top + mx.log(row_sum(exp_nonpositive(mx.maximum(logits - top, BANNED))))


def logprobs_at(logits: mx.array, token_ids: mx.array, num_top: int) -> tuple[mx.array, mx.array, mx.array]:
    """Natural log-probabilities under the raw logits [R, V]: of `token_ids` [R]; the `num_top` largest; their ids."""
    logits = logits.astype(mx.float32)
    norm = log_sum_exp(logits)
    chosen = mx.take_along_axis(logits, token_ids[:, None], axis=-1) - norm
    if num_top == 0:
        empty = mx.zeros((logits.shape[0], 0))
        return chosen[:, 0], empty, empty.astype(mx.uint32)
    # A fixed preselection, so that how ties are cut does not depend on what the neighbours asked for.
    values, ids = top_sorted(logits, 32 if num_top <= 32 else num_top)
    return chosen[:, 0], values[:, :num_top] - norm, ids[:, :num_top]
