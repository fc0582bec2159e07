"""Chooses the next token of every row of a batch, in one lazy graph. Knows no scheduling and no text. MLX thread.

`BatchSampler.sample` evaluates nothing: its tokens can feed the next forward before anybody has read them.
For one row the steps are, in this order,

    penalties -> logit bias, min_tokens -> grammar mask -> temperature -> top_k -> top_p -> min_p -> XTC -> draw

and greedy rows stop after the mask. Rows that are greedy and change nothing in the logits take the argmax of the raw
logits, and pay for nothing else. `logits.py` has the arithmetic up to the mask, `draws.py` what comes behind it.
Log-probabilities are those of the raw logits: before penalties, masks and temperature.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from vllm_mlx.engine import logits as lg
from vllm_mlx.engine.constraint import Guide
from vllm_mlx.engine.draws import Route, as_index, choose_route, column, draw, take_rows
from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.engine.step import TokenLogprobs

_LEAST_LOGPROB = -9999.0  # what OpenAI shows for minus infinity, which JSON cannot
_BROKEN_LOGITS = "the model returned logits that are not finite numbers"
_NOTHING_ALLOWED = "no token may follow here: grammar, bias and bans exclude the whole vocabulary"


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
        self.draft_mask: np.ndarray | None = None
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

    def ahead(self, num_tokens: int, mask: np.ndarray | None) -> SamplingRow:
        """This row as it will stand after that many more tokens, which a draft guesses. Not for rows with penalties."""
        row = copy.copy(self)
        row.num_completion += num_tokens
        row.guide = None
        row.draft_mask = mask
        return row

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
                values = [max(value, _LEAST_LOGPROB) for value in top_values[i][:num_top]]
                top = tuple(zip(top_ids[i][:num_top], values, strict=True))
                reports[row] = TokenLogprobs(token_ids[row], max(chosen[i], _LEAST_LOGPROB), top)
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
    def of(cls, rows: tuple[SamplingRow, ...], vocab: int) -> _Penalties:
        return cls(
            rows,
            mx.stack([_fitted(row.counts, vocab, 0.0) for row in rows if row.counts is not None]),
            mx.stack([_fitted(row.unrepeated, vocab, 1.0) for row in rows if row.unrepeated is not None]),
            column([row.params.presence_penalty for row in rows]),
            column([row.params.frequency_penalty for row in rows]),
            column([1.0 / row.params.repetition_penalty for row in rows]),
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


def _fitted(state: mx.array, vocab: int, fill: float) -> mx.array:
    """State for logits that are longer or shorter than the vocabulary the row was told of."""
    missing = vocab - state.shape[0]
    return mx.pad(state, (0, missing), constant_values=fill) if missing > 0 else state[:vocab]


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
        broken: mx.array | None = None
        if plain:
            order += plain
            tokens, broken = _greedy(logits, plain)
            parts.append(tokens)
        if taken:
            order += taken
            parts.append(as_index([forced[i] or 0 for i in taken]))
        no_token = mx.zeros((0,), dtype=mx.bool_)
        if rest:
            chosen = [rows[i] for i in rest]
            x = self._process(take_rows(logits, rest).astype(mx.float32), chosen, [masks[i] for i in rest])
            no_token = lg.row_max(x)[:, 0] < lg.BANNED_BELOW
            for positions, tokens in draw(x, chosen):
                order += [rest[p] for p in positions]
                parts.append(tokens)
        tokens = _in_order(parts, order)
        if broken is None:
            broken = lg.are_broken(logits)
        batch = self._report(logits, rows, tokens, broken, rest, no_token, host_errors)
        for row in rows:
            row.num_completion += 1
        return batch

    @staticmethod
    def _mask_of(row: SamplingRow, index: int, host_errors: dict[int, str]) -> np.ndarray | None:
        if row.guide is None:
            return row.draft_mask
        mask = row.guide.mask()
        if row.guide.failure is not None:
            host_errors[index] = row.guide.failure
        return mask

    def _process(self, x: mx.array, rows: Sequence[SamplingRow], masks: Sequence[np.ndarray | None]) -> mx.array:
        """Everything that changes logits. The rows with penalties come first."""
        x = mx.maximum(x, lg.BANNED)
        penalised = tuple(row for row in rows if row.has_penalties)
        if penalised:
            state = self._penalty_state(penalised, x.shape[-1])
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

    def _penalty_state(self, rows: tuple[SamplingRow, ...], vocab: int) -> _Penalties:
        state = self._penalties
        if state is None or [*map(id, state.rows)] != [*map(id, rows)]:
            if state is not None:
                state.give_back()
            state = self._penalties = _Penalties.of(rows, vocab)
        return state

    def _report(
        self,
        logits: mx.array,
        rows: Sequence[SamplingRow],
        tokens: mx.array,
        broken: mx.array,
        processed: Sequence[int],
        no_token: mx.array,
        host_errors: dict[int, str],
    ) -> SampledBatch:
        """Count the new tokens for penalties, judge the logits, take log-probabilities for the rows that ask."""
        state: list[mx.array] = []
        if any(row.has_penalties for row in rows):
            penalised = [i for i in processed if rows[i].has_penalties]
            forced = [i for i, row in enumerate(rows) if row.has_penalties and i not in set(penalised)]
            penalties = self._penalty_state(tuple(rows[i] for i in penalised + forced), logits.shape[-1])
            penalties.count(tokens[as_index(penalised + forced)])
            state = [penalties.counts, penalties.unrepeated]
        codes = broken.astype(mx.uint32)
        if processed:
            empty = mx.zeros((len(rows),), dtype=mx.uint32)
            empty = empty.at[as_index(processed)].add(no_token.astype(mx.uint32) * 2)
            codes = mx.where(codes > 0, codes, empty)
        asking = [(i, row.params.num_logprobs) for i, row in enumerate(rows) if row.params.num_logprobs is not None]
        logprobs = None
        if asking:
            indices = [i for i, _ in asking]
            most = max(num for _, num in asking)
            logprobs = lg.logprobs_at(take_rows(logits, indices), tokens[as_index(indices)], most)
        return SampledBatch(tokens, codes, host_errors, logprobs, asking, state)


def _greedy(logits: mx.array, indices: Sequence[int]) -> tuple[mx.array, mx.array | None]:
    """The likeliest tokens of some rows. Where they are most rows all are read, which is cheaper than to copy them out,
    and it comes out whether each of all is broken."""
    if 2 * len(indices) < logits.shape[0]:
        return lg.greedy(logits[as_index(indices)])[0], None
    tokens, broken = lg.greedy(logits)
    return (tokens if len(indices) == logits.shape[0] else tokens[as_index(indices)]), broken


def _in_order(parts: Sequence[mx.array], order: Sequence[int]) -> mx.array:
    tokens = parts[0] if len(parts) == 1 else mx.concatenate(list(parts))
    return tokens if list(order) == list(range(len(order))) else tokens[as_index(np.argsort(order).tolist())]


def _only_allows(mask: np.ndarray | None, token_ids: Sequence[int]) -> bool:
    """Would banning these tokens leave nothing?"""
    if mask is None:
        return False
    left = np.array(mask, dtype=np.uint32)
    for token in token_ids:
        if token // 32 < left.size:
            left[token // 32] &= ~np.uint32(1 << (token % 32))
    return not left.any()


def read_logprobs(
    token_ids: Sequence[int], chunks: Sequence[tuple[mx.array, mx.array, mx.array]]
) -> tuple[TokenLogprobs, ...]:
    """Wait for what `logprobs_at` made, chunk by chunk, of tokens that were given and not sampled."""
    read: list[TokenLogprobs] = []
    for arrays in chunks:
        for logprob, values, ids in zip(*(np.array(a).tolist() for a in arrays), strict=True):
            read.append(TokenLogprobs(token_ids[len(read)], logprob, tuple(zip(ids, values, strict=True))))
    return tuple(read)
