"""Chooses the next token of every row of a batch, in one lazy graph. Knows no scheduling and no text. MLX thread.

`BatchSampler.sample` evaluates nothing: its tokens can feed the next forward before anybody has read them.
For one row the steps are, in this order,

    penalties -> logit bias, min_tokens -> grammar mask -> temperature -> top_k -> top_p -> min_p -> XTC -> draw

and greedy rows stop after the mask. Rows take one of four routes, by their own parameters only:

    greedy   argmax. Rows that change nothing in the logits take it on the raw logits, and pay for nothing else.
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
from dataclasses import dataclass
from enum import IntEnum

import mlx.core as mx
import numpy as np

from vllm_mlx.engine import logits as lg
from vllm_mlx.engine.constraint import Guide
from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.engine.step import TokenLogprobs

GREEDY_BELOW_TEMPERATURE = 1e-5
_TOP_SIZES = (64, 512, 2048)
_MISS_PROBABILITY = 1e-12
_MAX_DRAWS = 1023
_DRAW_BLOCK = 128

_BROKEN_LOGITS = "the model returned logits that are not finite numbers"
_NOTHING_ALLOWED = "no token may follow here: grammar, bias and bans exclude the whole vocabulary"


class Route(IntEnum):
    GREEDY = 0
    TOP = 1
    NUCLEUS = 2
    SORTED = 3


class SamplingRow:
    """What one sequence brings to sampling. Mutable, MLX thread only; made anew after a preemption.

    `num_completion` counts tokens sampled so far, launched ones included: it is the position in the row's random
    stream, so a row rebuilt from its tokens goes on exactly where it was.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        vocab_size: int,
        seed: int,
        prompt_ids: Sequence[int] = (),
        completion_ids: Sequence[int] = (),
        stop_token_ids: frozenset[int] = frozenset(),
        guide: Guide | None = None,
    ) -> None:
        self.params = params
        self.vocab_size = vocab_size
        self.seed = (params.seed if params.seed is not None else seed) & 0xFFFFFFFFFFFFFFFF
        self.num_completion = len(completion_ids)
        self.guide = guide
        self.stop_token_ids = tuple(t for t in sorted(stop_token_ids) if t < vocab_size)
        self.bias = tuple((t, v) for t, v in params.logit_bias.items() if 0 <= t < vocab_size and v != 0.0)
        self.has_penalties = (
            params.presence_penalty != 0.0 or params.frequency_penalty != 0.0 or params.repetition_penalty != 1.0
        )
        self.route, self.num_top, self.num_draws = choose_route(params, vocab_size)
        self.counts: mx.array | None = None
        self.unrepeated: mx.array | None = None
        if self.has_penalties:
            self._build_penalty_state(prompt_ids, completion_ids)

    def _build_penalty_state(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> None:
        completion = np.asarray(completion_ids, dtype=np.int64)
        counts = np.bincount(completion, minlength=self.vocab_size)[: self.vocab_size]
        seen = counts > 0
        prompt = np.asarray(prompt_ids, dtype=np.int64)
        seen[prompt[(prompt >= 0) & (prompt < self.vocab_size)]] = True
        self.counts = mx.array(counts.astype(np.float32))
        self.unrepeated = mx.array(np.where(seen, np.float32(1.0 / self.params.repetition_penalty), np.float32(1.0)))

    @property
    def needs_host_token(self) -> bool:
        """The next sample needs the previous token on the host, so its step must not be launched before that."""
        return self.guide is not None and self.guide.needs_host_token

    @property
    def bans_stop_tokens(self) -> bool:
        return self.num_completion < self.params.min_tokens and bool(self.stop_token_ids)

    @property
    def is_plain_greedy(self) -> bool:
        """Argmax of the raw logits is the answer, unless a mask comes."""
        return self.route is Route.GREEDY and not self.has_penalties and not self.bias and not self.bans_stop_tokens


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


class SampledBatch:
    """The tokens of one step, still lazy. `collect` is the only call that waits for the device."""

    def __init__(
        self,
        tokens: mx.array,
        error_codes: mx.array,
        host_errors: dict[int, str],
        logprobs: tuple[mx.array, mx.array, mx.array] | None,
        logprob_rows: Sequence[tuple[int, int]],
        state: Sequence[mx.array],
    ) -> None:
        self.tokens = tokens
        self.row_errors: list[str | None] = []
        self._error_codes = error_codes
        self._host_errors = host_errors
        self._logprobs = logprobs
        self._logprob_rows = logprob_rows
        self._state = tuple(state)

    def arrays(self) -> list[mx.array]:
        """Everything to hand to `mx.async_eval`."""
        return [self.tokens, self._error_codes, *(self._logprobs or ()), *self._state]

    def collect(self) -> list[tuple[int, TokenLogprobs | None]]:
        """Wait, and read (token id, log-probabilities if asked for) of each row; fills `row_errors`.

        A row with an error has a token too, which means nothing.
        """
        token_ids = np.array(self.tokens).tolist()
        messages = (None, _BROKEN_LOGITS, _NOTHING_ALLOWED)
        self.row_errors = [messages[code] for code in np.array(self._error_codes).tolist()]
        for row, message in self._host_errors.items():
            self.row_errors[row] = message
        reports: list[TokenLogprobs | None] = [None] * len(token_ids)
        if self._logprobs is not None:
            chosen, top_values, top_ids = (np.array(a).tolist() for a in self._logprobs)
            for i, (row, num_top) in enumerate(self._logprob_rows):
                top = tuple(zip(top_ids[i][:num_top], top_values[i][:num_top], strict=True))
                reports[row] = TokenLogprobs(token_ids[row], chosen[i], top)
        return list(zip(token_ids, reports, strict=True))


@dataclass(slots=True)
class _Penalties:
    """Device state of the rows with penalties, stacked; rebuilt when these rows change."""

    rows: tuple[SamplingRow, ...]
    counts: mx.array
    unrepeated: mx.array
    presence: mx.array
    frequency: mx.array
    repetition: mx.array

    @classmethod
    def of(cls, rows: tuple[SamplingRow, ...]) -> _Penalties:
        return cls(
            rows,
            mx.stack([row.counts for row in rows if row.counts is not None]),
            mx.stack([row.unrepeated for row in rows if row.unrepeated is not None]),
            _column([row.params.presence_penalty for row in rows]),
            _column([row.params.frequency_penalty for row in rows]),
            _column([1.0 / row.params.repetition_penalty for row in rows]),
        )

    def apply(self, logits: mx.array) -> mx.array:
        return lg.repetition_and_additive_penalties(logits, self.counts, self.unrepeated, self.presence, self.frequency)

    def count(self, tokens: mx.array) -> None:
        index = mx.arange(tokens.shape[0], dtype=mx.uint32)
        self.counts = self.counts.at[index, tokens].add(1.0)
        self.unrepeated = mx.put_along_axis(self.unrepeated, tokens[:, None], self.repetition, axis=1)

    def give_back(self) -> None:
        for i, row in enumerate(self.rows):
            row.counts, row.unrepeated = self.counts[i], self.unrepeated[i]


def _column(values: Sequence[float]) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.float32)[:, None])


def _index(values: Sequence[int]) -> mx.array:
    return mx.array(np.asarray(values, dtype=np.uint32))


class BatchSampler:
    """Samples batches of rows that may join, leave and change places between calls."""

    def __init__(self) -> None:
        self._penalties: _Penalties | None = None

    def sample(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        *,
        masks: Sequence[np.ndarray | None] | None = None,
        forced: Sequence[int | None] | None = None,
    ) -> SampledBatch:
        """Choose one token for each row of `logits` [R, V] and advance the rows. Evaluates nothing.

        Masks (uint32 bits) and forced tokens come from the rows' guides unless given here.
        """
        if logits.shape[0] != len(rows):
            raise ValueError(f"{logits.shape[0]} rows of logits for {len(rows)} rows of sampling")
        forced = forced if forced is not None else [row.guide.forced() if row.guide else None for row in rows]
        host_errors: dict[int, str] = {}
        if masks is None:
            masks = [self._mask_of(row, i, host_errors) for i, row in enumerate(rows)]

        plain = [i for i, row in enumerate(rows) if forced[i] is None and masks[i] is None and row.is_plain_greedy]
        taken = [i for i, token in enumerate(forced) if token is not None]
        rest = sorted(set(range(len(rows))) - set(plain) - set(taken), key=lambda i: not rows[i].has_penalties)

        order: list[int] = []
        parts: list[mx.array] = []
        if plain:
            order += plain
            parts.append(_argmax_of(logits, plain))
        if taken:
            order += taken
            parts.append(_index([forced[i] or 0 for i in taken]))
        no_token = mx.zeros((0,), dtype=mx.bool_)
        if rest:
            chosen = [rows[i] for i in rest]
            x = self._process(_take_rows(logits, rest).astype(mx.float32), chosen, [masks[i] for i in rest])
            no_token = lg.row_max(x)[:, 0] < lg.BANNED_BELOW
            for positions, tokens in _draw_all(x, chosen):
                order += [rest[p] for p in positions]
                parts.append(tokens)
        tokens = _in_order(parts, order)
        batch = self._report(logits, rows, tokens, rest, no_token, host_errors)
        for row in rows:
            row.num_completion += 1
        return batch

    @staticmethod
    def _mask_of(row: SamplingRow, index: int, host_errors: dict[int, str]) -> np.ndarray | None:
        if row.guide is None:
            return None
        mask = row.guide.mask()
        if row.guide.failure is not None:
            host_errors[index] = row.guide.failure
        return mask

    def _process(self, x: mx.array, rows: Sequence[SamplingRow], masks: Sequence[np.ndarray | None]) -> mx.array:
        """Everything that changes logits. The rows with penalties come first."""
        x = mx.maximum(x, lg.BANNED)
        penalised = tuple(row for row in rows if row.has_penalties)
        if penalised:
            state = self._penalty_state(penalised)
            if len(penalised) == len(rows):
                x = state.apply(x)
            else:
                x = mx.concatenate([state.apply(x[: len(penalised)]), x[len(penalised) :]])
        at_rows: list[int] = []
        at_tokens: list[int] = []
        values: list[float] = []
        for i, row in enumerate(rows):
            additions = list(row.bias)
            if row.bans_stop_tokens and not _only_allows(masks[i], row.stop_token_ids):
                additions += [(token, lg.BANNED) for token in row.stop_token_ids]
            at_rows += [i] * len(additions)
            at_tokens += [token for token, _ in additions]
            values += [value for _, value in additions]
        x = lg.add_at(x, at_rows, at_tokens, values)
        return lg.apply_bitmasks(x, masks) if any(mask is not None for mask in masks) else x

    def _penalty_state(self, rows: tuple[SamplingRow, ...]) -> _Penalties:
        state = self._penalties
        if state is None or [*map(id, state.rows)] != [*map(id, rows)]:
            if state is not None:
                state.give_back()
            state = self._penalties = _Penalties.of(rows)
        return state

    def _report(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        tokens: mx.array,
        processed: Sequence[int],
        no_token: mx.array,
        host_errors: dict[int, str],
    ) -> SampledBatch:
        """Count the new tokens for penalties, judge the logits, take log-probabilities for the rows that ask."""
        state: list[mx.array] = []
        if any(row.has_penalties for row in rows):
            penalised = [i for i in processed if rows[i].has_penalties]
            forced = [i for i, row in enumerate(rows) if row.has_penalties and i not in set(penalised)]
            penalties = self._penalty_state(tuple(rows[i] for i in penalised + forced))
            penalties.count(tokens[_index(penalised + forced)])
            state = [penalties.counts, penalties.unrepeated]
        total = lg.row_sum(logits if logits.dtype != mx.float16 else logits.astype(mx.float32))[:, 0]
        codes = mx.logical_or(mx.isnan(total), total == float("inf")).astype(mx.uint32)
        if processed:
            empty = mx.zeros((len(rows),), dtype=mx.uint32)
            empty = empty.at[_index(processed)].add(no_token.astype(mx.uint32) * 2)
            codes = mx.where(codes > 0, codes, empty)
        asking = [(i, row.params.num_logprobs) for i, row in enumerate(rows) if row.params.num_logprobs is not None]
        logprobs = None
        if asking:
            indices = [i for i, _ in asking]
            most = max(num for _, num in asking)
            logprobs = lg.logprobs_at(_take_rows(logits, indices), tokens[_index(indices)], most)
        return SampledBatch(tokens, codes, host_errors, logprobs, asking, state)


def _take_rows(logits: mx.array, indices: Sequence[int]) -> mx.array:
    return logits if list(indices) == list(range(logits.shape[0])) else logits[_index(indices)]


def _argmax_of(logits: mx.array, indices: Sequence[int]) -> mx.array:
    """Argmax of some rows; where they are most rows, of all, which is cheaper than to copy them out."""
    if 2 * len(indices) < logits.shape[0]:
        return mx.argmax(logits[_index(indices)], axis=-1).astype(mx.uint32)
    tokens = mx.argmax(logits, axis=-1).astype(mx.uint32)
    return tokens if len(indices) == logits.shape[0] else tokens[_index(indices)]


def _in_order(parts: Sequence[mx.array], order: Sequence[int]) -> mx.array:
    tokens = parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
    return tokens if list(order) == list(range(len(order))) else tokens[_index(np.argsort(order).tolist())]


def _only_allows(mask: np.ndarray | None, token_ids: Sequence[int]) -> bool:
    """Would banning these tokens leave nothing?"""
    if mask is None:
        return False
    left = np.array(mask, dtype=np.uint32)
    for token in token_ids:
        if token // 32 < left.size:
            left[token // 32] &= ~np.uint32(1 << (token % 32))
    return not left.any()


def _draw_all(x: mx.array, rows: Sequence[SamplingRow]) -> list[tuple[list[int], mx.array]]:
    """Tokens for processed logits, group by group: (positions in `rows`, tokens)."""
    groups: dict[tuple[Route, int], list[int]] = {}
    for position, row in enumerate(rows):
        groups.setdefault((row.route, row.num_top), []).append(position)
    drawn = []
    for (route, num_top), positions in groups.items():
        own = _take_rows(x, positions)
        members = [rows[p] for p in positions]
        if route is Route.GREEDY:
            tokens = mx.argmax(own, axis=-1).astype(mx.uint32)
        elif route is Route.NUCLEUS:
            tokens = _draw_nucleus(own, members)
        else:
            tokens = _draw_sorted(own, members, num_top)
        drawn.append((positions, tokens))
    return drawn


def _draw_sorted(x: mx.array, rows: Sequence[SamplingRow], num_top: int) -> mx.array:
    """Routes `top` and `sorted`: all filters on candidates in descending order, then the inverse of their sums."""
    params = [row.params for row in rows]
    inverse_temperature = _column([1.0 / p.temperature for p in params])
    values, token_ids = lg.top_sorted(x, num_top)
    top = values[:, :1]
    weights = lg.exp_nonpositive((values - top) * inverse_temperature)
    vocab = x.shape[-1]
    top_k = [p.top_k if 0 < p.top_k < vocab else vocab for p in params]
    ranks = mx.arange(weights.shape[-1], dtype=mx.uint32)[None, :]
    weights = weights * (ranks < _index(top_k)[:, None])
    if any(p.top_p < 1.0 for p in params):
        total = weights.sum(-1, keepdims=True)
        if any(k > num_top for k in top_k):  # only top_p bounds the candidates: its mass is the whole vocabulary's
            everything = lg.row_sum(lg.exp_nonpositive((x - top) * inverse_temperature))
            total = mx.where(_index(top_k)[:, None] > num_top, everything, total)
        above = mx.cumsum(weights, axis=-1) - weights
        # 2.0: no cumulative sum reaches it, so that a row without top_p keeps all
        inside = above < _column([p.top_p if p.top_p < 1.0 else 2.0 for p in params]) * total
        inside = mx.logical_or(inside, ranks == 0)
        last = mx.min(mx.where(inside, weights, 2.0), axis=-1, keepdims=True)
        weights = weights * (weights >= last)
    if any(p.min_p > 0.0 for p in params):
        weights = weights * (weights >= _column([p.min_p for p in params]))
    if any(p.xtc_probability > 0.0 for p in params):
        weights = _exclude_top_choices(weights, rows)
    random = uniforms([row.seed for row in rows], [row.num_completion for row in rows], 1)
    rank = _first_above(weights, mx.array(random))
    return mx.take_along_axis(token_ids, rank, axis=-1)[:, 0]


def _exclude_top_choices(weights: mx.array, rows: Sequence[SamplingRow]) -> mx.array:
    """XTC: with its probability, drop every token over the threshold except the least likely of these.

    Whether it happens at a position is the row's own random number, known on the host.
    """
    coins = uniforms([row.seed for row in rows], [row.num_completion for row in rows], 1, stream=1)[:, 0]
    thresholds = [
        row.params.xtc_threshold if coin < row.params.xtc_probability else 2.0
        for row, coin in zip(rows, coins.tolist(), strict=True)
    ]
    over = (weights / weights.sum(-1, keepdims=True) >= _column(thresholds)).astype(mx.uint32)
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


def _draw_nucleus(x: mx.array, rows: Sequence[SamplingRow]) -> mx.array:
    """Route `nucleus`; the module's docstring says how it works."""
    params = [row.params for row in rows]
    num_rows = len(rows)
    num_draws = max(row.num_draws for row in rows)
    x = lg.pad_vocab(x, _DRAW_BLOCK, lg.BANNED)
    weights = lg.exp_nonpositive((x - lg.row_max(x)) * _column([1.0 / p.temperature for p in params]))
    total = lg.row_sum(weights)  # before min_p: top_p is a share of this
    if any(p.min_p > 0.0 for p in params):
        weights = weights * (weights >= _column([p.min_p for p in params]))

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

    inside = _inside_nucleus(weights, drawn, _column([p.top_p if p.top_p < 1.0 else 2.0 for p in params]) * total)
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
