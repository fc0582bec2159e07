"""Draws tokens from processed logits, each row by its own parameters and its own random numbers. MLX thread, lazy.

Rows take one of four routes, never by what their neighbours ask for:

    greedy   argmax.
    top      at most 2048 candidates are possible (top_k, or a top_p small enough): they are preselected and sorted.
    nucleus  top_p and min_p over the whole vocabulary without sorting it: `num_draws` tokens are drawn from the
             distribution, and the first of them that lies inside the nucleus is an exact sample of the nucleus. Whether
             a drawn token is inside is a matter of the mass above it, found for all draws together by bisection. The
             chance that none is inside is under 1e-12, less than rounding does; then it is the likeliest token.
    sorted   everything else (XTC, huge top_k, top_p around 0.02): the plain sort, correct and slow.

Random numbers are a hash of (row seed, position), computed on the host, so that neither neighbours nor the row's place
can change a row's token. Tokens that tie with the last one inside a nucleus are inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Protocol

import mlx.core as mx
import numpy as np

from vllm_mlx.engine import logits as lg
from vllm_mlx.engine.request import SamplingParams

GREEDY_BELOW_TEMPERATURE = 1e-5
_TOP_SIZES = (64, 512, 2048)
_MISS_PROBABILITY = 1e-12
_MAX_DRAWS = 1023
_DRAW_BLOCK = 128


class Route(IntEnum):
    GREEDY = 0
    TOP = 1
    NUCLEUS = 2
    SORTED = 3


class DrawingRow(Protocol):
    """What a row brings to a draw; `num_completion` is its place in its random stream."""

    params: SamplingParams
    seed: int
    num_completion: int
    route: Route
    num_top: int
    num_draws: int


def choose_route(params: SamplingParams, vocab_size: int) -> tuple[Route, int, int]:
    """(route, preselection size, number of draws) from the row's own parameters: never from its neighbours'."""
    top_k = params.top_k if 0 < params.top_k < vocab_size else vocab_size
    is_greedy = params.temperature < GREEDY_BELOW_TEMPERATURE or top_k == 1 or params.top_p * vocab_size <= 1.0
    if is_greedy:
        return Route.GREEDY, 0, 0
    # n of V tokens hold at least n / V of the mass when they are the likeliest, which bounds the nucleus.
    num_possible = min(top_k, int(params.top_p * vocab_size) + 1) if params.top_p < 1.0 else top_k
    for size in _TOP_SIZES:
        if num_possible <= size:
            return Route.TOP, size, 0
    num_draws = _num_draws(params.top_p)
    if top_k < vocab_size or params.xtc_probability > 0.0 or num_draws > _MAX_DRAWS:
        return Route.SORTED, vocab_size, 0
    return Route.NUCLEUS, 0, num_draws


def _num_draws(top_p: float) -> int:
    """Smallest 2**k - 1 draws that all fall outside a nucleus of mass `top_p` with less than the miss probability."""
    num, missed = 1, 1.0 - top_p
    while top_p < 1.0 and missed**num > _MISS_PROBABILITY and num <= _MAX_DRAWS:
        num = num * 2 + 1
    return num


def uniforms(seeds: Sequence[int], positions: Sequence[int], num: int, stream: int = 0) -> np.ndarray:
    """float32 [R, num] in [0, 1), a function of (seed, position, stream, column) only.

    The finaliser of SplitMix64, twice over. 23 bits each, so that `u * total` stays below `total` in float32.
    """
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seeds, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        state = _mix(state ^ _mix(np.asarray(positions, dtype=np.uint64) * np.uint64(4) + np.uint64(stream)))
        columns = np.arange(1, num + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = _mix(state[:, None] + columns[None, :])
    return (bits >> np.uint64(41)).astype(np.float32) * np.float32(2.0**-23)


def _mix(z: np.ndarray) -> np.ndarray:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def draw(x: mx.array, rows: Sequence[DrawingRow]) -> list[tuple[list[int], mx.array]]:
    """Tokens for processed logits, group by group: (positions in `rows`, tokens)."""
    groups: dict[tuple[Route, int], list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault((row.route, row.num_top), []).append(position)
    drawn = []
    for (route, num_top), positions in groups.items():
        own = take_rows(x, positions)
        members = [rows[p] for p in positions]
        if route is Route.GREEDY:
            tokens = mx.argmax(own, axis=-1).astype(mx.uint32)
        elif route is Route.NUCLEUS:
            tokens = _draw_nucleus(own, members)
        else:
            tokens = _draw_sorted(own, members, num_top)
        drawn.append((positions, tokens))
    return drawn


def _draw_sorted(x: mx.array, rows: Sequence[DrawingRow], num_top: int) -> mx.array:
    """Routes `top` and `sorted`: all filters on candidates in descending order, then the inverse of their sums."""
    params = [row.params for row in rows]
    inverse_temperature = column([1.0 / p.temperature for p in params])
    values, token_ids = lg.top_sorted(x, num_top)
    top = values[:, :1]
    weights = lg.exp_nonpositive((values - top) * inverse_temperature)
    vocab = x.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    ranks = mx.arange(weights.shape[-1], dtype=mx.uint32)[None, :]
    weights = weights * (ranks < as_index(top_k)[:, None])
    if any(p.top_p < 1.0 for p in params):
        total = weights.sum(-1, keepdims=True)
        if any(k > num_top for k in top_k):  # only top_p bounds the candidates: its mass is the whole vocabulary's
            everything = lg.row_sum(lg.exp_nonpositive((x - top) * inverse_temperature))
            total = mx.where(as_index(top_k)[:, None] > num_top, everything, total)
        above = mx.cumsum(weights, axis=-1) - weights
        # 2.0: no cumulative sum reaches it, so that a row without top_p keeps all
        inside = above < column([p.top_p if p.top_p < 1.0 else 2.0 for p in params]) * total
        inside = mx.logical_or(inside, ranks == 0)
        last = mx.min(mx.where(inside, weights, 2.0), axis=-1, keepdims=True)
        weights = weights * (weights >= last)
    if any(p.min_p > 0.0 for p in params):
        weights = weights * (weights >= column([p.min_p for p in params]))
    if any(p.xtc_probability > 0.0 for p in params):
        weights = _exclude_top_choices(weights, rows)
    random = uniforms([row.seed for row in rows], [row.num_completion for row in rows], 1)
    rank = _first_above(weights, mx.array(random))
    return mx.take_along_axis(token_ids, rank, axis=-1)[:, 0]


def _exclude_top_choices(weights: mx.array, rows: Sequence[DrawingRow]) -> mx.array:
    """XTC: with its probability, drop every token over the threshold except the least likely of these.

    Whether it happens at a position is the row's own random number, known on the host.
    """
    coins = uniforms([row.seed for row in rows], [row.num_completion for row in rows], 1, stream=1)[:, 0]
    thresholds = [
        row.params.xtc_threshold if coin < row.params.xtc_probability else 2.0
        for row, coin in zip(rows, coins.tolist(), strict=True)
    ]
    over = (weights / weights.sum(-1, keepdims=True) >= column(thresholds)).astype(mx.uint32)
    num_over = over.sum(-1, keepdims=True)
    ranks = mx.arange(weights.shape[-1], dtype=mx.uint32)[None, :]
    return weights * (ranks + 1 >= num_over)


def _first_above(weights: mx.array, random: mx.array) -> mx.array:
    """Index [R, N] of the first element whose cumulative weight passes `random` [R, N] times the total.

    Never an element of weight zero, whatever rounding does, so long as one is positive.
    """
    sums = mx.cumsum(weights, axis=-1)
    passed = sums[:, None, :] > (random * sums[:, -1:])[:, :, None]
    passed = mx.logical_and(passed, (weights > 0)[:, None, :])
    index = mx.argmax(passed, axis=-1)
    return mx.where(passed.any(-1), index, mx.argmax(weights, axis=-1, keepdims=True)).astype(mx.uint32)


def _draw_nucleus(x: mx.array, rows: Sequence[DrawingRow]) -> mx.array:
    """Route `nucleus`; the module's docstring says how it works."""
    params = [row.params for row in rows]
    num_rows = len(rows)
    num_draws = max(row.num_draws for row in rows)
    x = lg.pad_vocab(x, _DRAW_BLOCK, lg.BANNED)
    weights = lg.exp_nonpositive((x - lg.row_max(x)) * column([1.0 / p.temperature for p in params]))
    total = lg.row_sum(weights)  # before min_p: top_p is a share of this
    if any(p.min_p > 0.0 for p in params):
        weights = weights * (weights >= column([p.min_p for p in params]))

    # Draw a block by its sum, then a token within it by its weight: two uniforms a draw, one pass over the vocabulary.
    columns = weights.reshape(num_rows, _DRAW_BLOCK, -1)
    num_blocks = columns.shape[-1]
    random = uniforms([row.seed for row in rows], [row.num_completion for row in rows], 2 * num_draws)
    random = random.reshape(num_rows, num_draws, 2)
    block = _first_above(columns.sum(1), mx.array(random[:, :, 0]))
    members = mx.take_along_axis(columns, block[:, None, :], axis=-1).transpose(0, 2, 1)
    members = members.reshape(num_rows * num_draws, _DRAW_BLOCK)
    inner = _first_above(members, mx.array(random[:, :, 1].reshape(-1, 1)))
    drawn = mx.take_along_axis(members, inner, axis=-1).reshape(num_rows, num_draws)
    token_ids = inner.reshape(num_rows, num_draws) * num_blocks + block
    if num_draws == 1:
        return token_ids[:, 0]

    inside = _inside_nucleus(weights, drawn, column([p.top_p if p.top_p < 1.0 else 2.0 for p in params]) * total)
    own_draws = np.arange(num_draws)[None, :] < np.asarray([row.num_draws for row in rows])[:, None]
    inside = mx.logical_and(inside, mx.array(own_draws))
    first = mx.take_along_axis(token_ids, mx.argmax(inside, axis=-1, keepdims=True), axis=-1)[:, 0]
    return mx.where(inside.any(-1), first, mx.argmax(x, axis=-1).astype(mx.uint32))


def _inside_nucleus(weights: mx.array, drawn: mx.array, limit: mx.array) -> mx.array:
    """Which drawn tokens [R, N] have less than `limit` [R, 1] of mass strictly above. N is 2**k - 1, in k passes."""
    num_rows, num_draws = drawn.shape
    descending = -mx.sort(-drawn, axis=-1)
    low = mx.zeros((num_rows, 1), dtype=mx.uint32)  # the `low` heaviest draws are inside
    step = (num_draws + 1) // 2
    while step:
        pivot = mx.take_along_axis(descending, low + (step - 1), axis=-1)
        mass_above = lg.row_sum(weights * (weights > pivot))
        low = low + (mass_above < limit).astype(mx.uint32) * step
        step //= 2
    lightest = mx.take_along_axis(descending, mx.maximum(low, 1) - 1, axis=-1)
    return mx.logical_and(drawn >= lightest, low > 0)


def column(values: Sequence[float]) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.float32)[:, None])


def as_index(values: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.uint32))


def take_rows(logits: mx.array, indices: Sequence[int]) -> mx.array:
    return logits if list(indices) == list(range(logits.shape[0])) else logits[as_index(indices)]
