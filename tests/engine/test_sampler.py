"""Sampling against plain numpy: distributions, independence of neighbours, filters, failures of single rows."""

from __future__ import annotations

import math

import mlx.core as mx
import numpy as np
import pytest

from vllm_mlx.engine import sampler as sampler_module
from vllm_mlx.engine.draws import Route, choose_route, uniforms
from vllm_mlx.engine.request import SamplingParams
from vllm_mlx.engine.sampler import BatchSampler, SamplingRow

VOCAB = 1000


def make_row(vocab: int = VOCAB, entropy: int = 0, **params: object) -> SamplingRow:
    row_keys = ("prompt_ids", "completion_ids", "stop_token_ids", "guide")
    extra = {key: params.pop(key) for key in row_keys if key in params}
    return SamplingRow(SamplingParams(**params), vocab_size=vocab, seed=entropy, **extra)  # type: ignore[arg-type]


def random_logits(num_rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 2.5) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((num_rows, vocab)) * scale).astype(np.float32)


def sample_ids(logits: np.ndarray, rows: list[SamplingRow], **kw: object) -> list[int]:
    batch = BatchSampler().sample(mx.array(logits), rows, **kw)  # type: ignore[arg-type]
    ids = [token for token, _ in batch.collect()]
    assert batch.row_errors == [None] * len(rows)
    return ids


def oracle(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """The distribution of one row (no penalties), by sorting everything in float64."""
    z = logits.astype(np.float64) / p.temperature
    probs = np.exp(z - z.max())
    vocab = z.size
    order = np.argsort(-probs, kind="stable")
    if 0 < p.top_k < vocab:
        probs[order[p.top_k :]] = 0.0
    if p.top_p < 1.0:
        descending = probs[order]
        inside = np.cumsum(descending) - descending < p.top_p * probs.sum()
        probs[probs < descending[inside].min()] = 0.0
    probs[probs < p.min_p * probs.max()] = 0.0
    return probs / probs.sum()


def chi_square_is_plausible(counts: np.ndarray, probs: np.ndarray) -> bool:
    """Pearson's statistic within six standard deviations of its mean, cells of small expectation merged."""
    total = counts.sum()
    expected = probs * total
    large = expected >= 8
    observed = np.append(counts[large], counts[~large].sum())
    wanted = np.append(expected[large], expected[~large].sum())
    if wanted[-1] < 1e-9:
        assert observed[-1] == 0, "a token outside the support was drawn"
        observed, wanted = observed[:-1], wanted[:-1]
    elif wanted[-1] < 8:
        observed, wanted = observed[:-1], wanted[:-1]
    if len(wanted) < 2:
        return True
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    freedom = len(wanted) - 1
    return abs(statistic - freedom) < 6 * math.sqrt(2 * freedom)


def draw_many(logits: np.ndarray, params: SamplingParams, num: int, vocab: int) -> np.ndarray:
    """Token counts of `num` draws: 250 rows of different seeds at successive positions."""
    num_rows = 250
    rows = [SamplingRow(params, vocab_size=vocab, seed=seed) for seed in range(num_rows)]
    tiled = mx.array(np.tile(logits, (num_rows, 1)))
    batch_sampler = BatchSampler()
    counts = np.zeros(vocab, dtype=np.int64)
    for _ in range(num // num_rows):
        tokens = batch_sampler.sample(tiled, rows).tokens
        counts += np.bincount(np.array(tokens), minlength=vocab)
    return counts


ROUTES = {
    "temperature": dict(temperature=0.8),
    "top_p": dict(temperature=1.0, top_p=0.9),
    "top_p_half": dict(temperature=1.3, top_p=0.5),
    "top_p_small": dict(temperature=1.0, top_p=0.05),
    "min_p": dict(temperature=1.0, min_p=0.05),
    "top_p_and_min_p": dict(temperature=1.2, top_p=0.95, min_p=0.02),
    "top_k": dict(temperature=1.0, top_k=7),
    "top_k_and_top_p": dict(temperature=0.9, top_k=40, top_p=0.8),
    "everything": dict(temperature=1.5, top_k=50, top_p=0.9, min_p=0.1),
    "top_k_over_vocab": dict(temperature=1.0, top_k=10**6, top_p=0.7),
}


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("vocab", [600, 5003])
def test_draws_follow_the_exact_distribution(name: str, vocab: int) -> None:
    params = SamplingParams(**ROUTES[name])
    logits = random_logits(1, vocab, seed=vocab)[0]
    counts = draw_many(logits, params, 20_000, vocab)
    probs = oracle(logits, params)
    assert counts[probs == 0].sum() == 0
    assert chi_square_is_plausible(counts, probs)


def test_a_wrong_distribution_would_be_noticed() -> None:
    logits = random_logits(1, 600)[0]
    counts = draw_many(logits, SamplingParams(temperature=1.0), 20_000, 600)
    assert not chi_square_is_plausible(counts, oracle(logits, SamplingParams(temperature=1.1)))


def test_the_nucleus_route_is_the_sorted_route_on_flat_distributions() -> None:
    """Ten thousand tokens inside: no preselected set could hold them."""
    vocab = 40_000
    logits = random_logits(1, vocab, scale=0.05)[0]
    params = SamplingParams(temperature=1.0, top_p=0.3)
    assert choose_route(params, vocab)[0] is Route.NUCLEUS
    inside = oracle(logits, params) > 0
    assert inside.sum() > 10_000
    rows = [SamplingRow(params, vocab_size=vocab, seed=seed) for seed in range(64)]
    ids = sample_ids(np.tile(logits, (64, 1)), rows)
    assert inside[ids].all() and len(set(ids)) > 60


def test_routes_depend_on_the_rows_own_parameters() -> None:
    def route(**kw: object) -> Route:
        return choose_route(SamplingParams(**kw), 150_000)[0]  # type: ignore[arg-type]

    assert route() is Route.GREEDY
    assert route(temperature=1e-7) is Route.GREEDY
    assert route(temperature=1.0, top_k=1) is Route.GREEDY
    assert route(temperature=1.0, top_p=0.0) is Route.GREEDY
    assert route(temperature=1.0, top_k=20, top_p=0.95) is Route.TOP
    assert route(temperature=1.0, top_p=0.01) is Route.TOP
    assert route(temperature=1.0) is Route.NUCLEUS
    assert route(temperature=1.0, top_p=0.95, min_p=0.1) is Route.NUCLEUS
    assert route(temperature=1.0, top_k=5000) is Route.SORTED
    assert route(temperature=1.0, top_p=0.02) is Route.SORTED
    assert route(temperature=1.0, xtc_probability=0.5) is Route.SORTED


MIXTURE = [
    dict(temperature=0.0),
    dict(temperature=1.0, seed=5),
    dict(temperature=0.7, top_p=0.95, seed=6),
    dict(temperature=0.7, top_p=0.3, seed=7),
    dict(temperature=1.5, top_k=3000, seed=8),
    dict(temperature=1.5, top_k=20, top_p=0.9, seed=9),
    dict(temperature=1.0, min_p=0.02, seed=10),
    dict(temperature=0.0, presence_penalty=1.0, repetition_penalty=1.2),
    dict(temperature=1.0, frequency_penalty=0.5, seed=11),
    dict(temperature=1.0, top_p=0.9, logit_bias={3: 5.0, 900: -100.0}, seed=12),
    dict(temperature=1.0, xtc_probability=0.5, seed=13),
    dict(temperature=0.0, num_logprobs=3),
]


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_row_gets_the_same_tokens_alone_and_in_any_company(dtype: mx.Dtype) -> None:
    vocab, steps = 20_000, 6
    logits = random_logits(steps * len(MIXTURE), vocab).reshape(steps, len(MIXTURE), vocab)
    alone = []
    for i, params in enumerate(MIXTURE):
        row, own = make_row(vocab, **params), BatchSampler()
        alone.append(
            [int(own.sample(mx.array(logits[s, i : i + 1]).astype(dtype), [row]).tokens[0]) for s in range(steps)]
        )

    shuffles = np.random.default_rng(1)
    rows = [make_row(vocab, entropy=99, **params) for params in MIXTURE]
    together: list[list[int]] = [[] for _ in MIXTURE]
    shared = BatchSampler()
    while any(len(t) < steps for t in together):  # rows join late, sit out, and change places
        ready = [i for i in range(len(MIXTURE)) if len(together[i]) < steps]
        chosen = shuffles.permutation(ready)[: shuffles.integers(1, len(ready) + 1)].tolist()
        x = np.stack([logits[len(together[i]), i] for i in chosen])
        tokens = np.array(shared.sample(mx.array(x).astype(dtype), [rows[i] for i in chosen]).tokens).tolist()
        for i, token in zip(chosen, tokens, strict=True):
            together[i].append(token)
    assert together == alone


def test_a_row_rebuilt_from_its_tokens_goes_on_where_it_was() -> None:
    logits = random_logits(8)
    params = SamplingParams(temperature=1.0, top_p=0.9, seed=3, frequency_penalty=0.7, repetition_penalty=1.3)
    whole = SamplingRow(params, vocab_size=VOCAB, seed=0, prompt_ids=[1, 2, 3])
    batch_sampler = BatchSampler()
    ids = [int(batch_sampler.sample(mx.array(logits[i : i + 1]), [whole]).tokens[0]) for i in range(8)]
    rebuilt = SamplingRow(params, vocab_size=VOCAB, seed=0, prompt_ids=[1, 2, 3], completion_ids=ids[:5])
    assert [int(BatchSampler().sample(mx.array(logits[5:6]), [rebuilt]).tokens[0])] == ids[5:6]


def test_random_numbers_are_uniform_and_distinct() -> None:
    u = uniforms(list(range(200)), [0] * 200, 100)
    assert u.min() >= 0.0 and u.max() < 1.0
    assert chi_square_is_plausible(np.histogram(u, 20, (0, 1))[0], np.full(20, 1 / 20))
    assert len(np.unique(u)) > 19_900
    assert np.array_equal(u[7:9], uniforms([7, 8], [0, 0], 100))
    assert not np.array_equal(uniforms([1], [0], 4), uniforms([1], [0], 4, stream=1))
    neighbours = np.corrcoef(uniforms([1], [0], 5000)[0], uniforms([1], [1], 5000)[0])[0, 1]
    assert abs(neighbours) < 0.06


def test_only_unseeded_rows_use_the_callers_entropy() -> None:
    logits = np.zeros((1, VOCAB), dtype=np.float32)
    unseeded = {sample_ids(logits, [make_row(entropy=e, temperature=1.0)])[0] for e in range(20)}
    seeded = {sample_ids(logits, [make_row(entropy=e, temperature=1.0, seed=4)])[0] for e in range(20)}
    assert len(unseeded) > 15 and len(seeded) == 1


def test_sampling_evaluates_nothing_and_chains_on_lazy_tokens() -> None:
    """Logits of step two are made of the unread token of step one."""
    base = mx.array(random_logits(1))
    row = make_row(temperature=1.0, seed=1, repetition_penalty=1.5, presence_penalty=1.0)
    batch_sampler = BatchSampler()
    first = batch_sampler.sample(base, [row])
    shifted = base * 0 + mx.where(mx.arange(VOCAB)[None, :] == first.tokens[:, None], 40.0, 0.0)
    second = batch_sampler.sample(shifted, [row])
    mx.eval(*second.arrays())
    assert second.collect()[0][0] == first.collect()[0][0]
    assert row.num_completion == 2


def test_penalties_see_tokens_that_were_never_read() -> None:
    """A heavy frequency penalty walks down the ranking, one launched token after the other."""
    logits = np.zeros((1, 50), dtype=np.float32)
    logits[0, :4] = [4.0, 3.0, 2.0, 1.0]
    row = make_row(50, frequency_penalty=2.0)
    batch_sampler = BatchSampler()
    batches = [batch_sampler.sample(mx.array(logits), [row]) for _ in range(5)]
    assert [b.collect()[0][0] for b in batches] == [0, 1, 0, 2, 1]


def test_penalties_match_the_definition() -> None:
    rng = np.random.default_rng(4)
    logits = random_logits(3, 200)
    prompt, completion = rng.integers(0, 200, 30).tolist(), rng.integers(0, 200, 40).tolist()
    presence, frequency, repetition = [0.5, 0.0, -1.0], [0.3, 1.1, 0.0], [1.0, 1.4, 0.8]
    rows = [
        make_row(
            200,
            prompt_ids=prompt,
            completion_ids=completion,
            presence_penalty=a,
            frequency_penalty=f,
            repetition_penalty=r,
        )
        for a, f, r in zip(presence, frequency, repetition, strict=True)
    ]
    expected = []
    counts = np.bincount(completion, minlength=200)
    for i in range(3):
        z = logits[i].astype(np.float64)
        for token in set(prompt) | set(completion):
            z[token] = z[token] / repetition[i] if z[token] > 0 else z[token] * repetition[i]
        expected.append(int(np.argmax(z - counts * frequency[i] - (counts > 0) * presence[i])))
    assert sample_ids(logits, rows) == expected


def test_forced_tokens_are_counted_by_penalties() -> None:
    logits = np.zeros((2, 50), dtype=np.float32)
    logits[:, 9] = 1.0
    rows = [make_row(50, presence_penalty=1.5), make_row(50, presence_penalty=1.5)]
    batch_sampler = BatchSampler()
    first = batch_sampler.sample(mx.array(logits), rows, forced=[9, 5])
    second = batch_sampler.sample(mx.array(logits), rows)
    assert [t for t, _ in first.collect()] == [9, 5]
    assert [t for t, _ in second.collect()] == [0, 9]


def test_logit_bias_bans_and_compels() -> None:
    logits = random_logits(2)
    best = int(logits[0].argmax())
    ids = sample_ids(logits, [make_row(logit_bias={best: -100.0}), make_row(temperature=1.0, logit_bias={123: 100.0})])
    assert ids[0] == int(np.argsort(logits[0])[-2])
    assert ids[1] == 123


def test_min_tokens_bans_stop_tokens_until_then() -> None:
    logits = np.zeros((1, 50), dtype=np.float32)
    logits[0, [7, 8]] = [9.0, 8.0]
    row = make_row(50, min_tokens=2, stop_token_ids=frozenset({7, 8}))
    batch_sampler = BatchSampler()
    assert [batch_sampler.sample(mx.array(logits), [row]).collect()[0][0] for _ in range(3)] == [0, 0, 7]


def test_min_tokens_yields_to_a_grammar_that_is_complete() -> None:
    mask = np.zeros(2, dtype=np.uint32)
    mask[0] = 1 << 7
    row = make_row(50, min_tokens=5, stop_token_ids=frozenset({7}))
    assert sample_ids(np.zeros((1, 50), dtype=np.float32), [row], masks=[mask]) == [7]


@pytest.mark.parametrize(
    "params", [dict(), dict(temperature=1.0), dict(temperature=1.0, top_p=0.9), dict(temperature=2.0, top_k=5)]
)
def test_a_mask_of_one_token_leaves_only_that(params: dict[str, float]) -> None:
    mask = np.zeros((VOCAB + 31) // 32, dtype=np.uint32)
    mask[777 // 32] = 1 << (777 % 32)
    ids = sample_ids(random_logits(3), [make_row(**params), make_row(), make_row()], masks=[mask, None, None])
    assert ids == [777, int(random_logits(3)[1].argmax()), int(random_logits(3)[2].argmax())]


def test_tokens_past_the_end_of_a_mask_are_banned() -> None:
    logits = np.zeros((1, 100), dtype=np.float32)
    logits[0, 99] = 50.0
    mask = np.full(2, 0xFFFFFFFF, dtype=np.uint32)
    assert sample_ids(logits, [make_row(100)], masks=[mask])[0] < 64


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("params", [dict(), dict(temperature=1.0, top_p=0.9), dict(temperature=1.0, top_k=5)])
def test_a_row_of_broken_logits_fails_alone(bad: float, params: dict[str, float]) -> None:
    logits = random_logits(3)
    logits[1, 500] = bad
    batch = BatchSampler().sample(mx.array(logits), [make_row(**params) for _ in range(3)])
    healthy = [batch.collect()[i][0] for i in (0, 2)]
    assert batch.row_errors[1] is not None and "finite" in batch.row_errors[1]
    assert batch.row_errors[0] is None and batch.row_errors[2] is None
    assert healthy == sample_ids(random_logits(3)[[0, 2]], [make_row(**params) for _ in range(2)])


def test_minus_infinity_is_a_ban_and_not_an_error() -> None:
    logits = np.full((2, 64), -np.inf, dtype=np.float32)
    logits[:, 11] = -5.0
    assert sample_ids(logits, [make_row(64), make_row(64, temperature=1.0, top_p=0.9)]) == [11, 11]


@pytest.mark.parametrize("params", [dict(), dict(temperature=1.0), dict(temperature=1.0, top_k=5)])
def test_a_mask_that_allows_nothing_fails_the_row(params: dict[str, float]) -> None:
    nothing = np.zeros((VOCAB + 31) // 32, dtype=np.uint32)
    batch = BatchSampler().sample(mx.array(random_logits(2)), [make_row(**params), make_row()], masks=[nothing, None])
    batch.collect()
    assert batch.row_errors[0] is not None and "no token" in batch.row_errors[0]
    assert batch.row_errors[1] is None


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = random_logits(3)
    rows = [
        make_row(num_logprobs=4, logit_bias={1: 50.0}, temperature=0.3),
        make_row(temperature=1.0),
        make_row(num_logprobs=0, presence_penalty=1.0),
    ]
    batch = BatchSampler().sample(mx.array(logits), rows)
    (token, report), (_, nothing), (last, bare) = batch.collect()
    z = logits.astype(np.float64)
    expected = z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
    assert token == 1 and nothing is None and report is not None and bare is not None
    assert report.logprob == pytest.approx(expected[0, 1], abs=2e-4)
    order = np.argsort(-logits[0])[:4]
    assert [i for i, _ in report.top] == order.tolist()
    assert [v for _, v in report.top] == pytest.approx(expected[0, order].tolist(), abs=2e-4)
    assert bare.top == () and bare.logprob == pytest.approx(expected[2, last], abs=2e-4)


def test_logprobs_of_impossible_tokens_are_numbers() -> None:
    logits = np.array([[0.0, -np.inf, -np.inf]], dtype=np.float32)
    batch = BatchSampler().sample(mx.array(logits), [make_row(3, num_logprobs=3)], forced=[1])
    report = batch.collect()[0][1]
    assert report is not None and report.logprob == -9999.0
    assert [value for _, value in report.top] == [0.0, -9999.0, -9999.0]


def test_logits_may_be_wider_than_the_vocabulary_a_row_was_told_of() -> None:
    logits = np.zeros((1, 64), dtype=np.float32)
    logits[0, [60, 3]] = [3.0, 2.0]
    row = make_row(50, frequency_penalty=2.0, repetition_penalty=1.1, prompt_ids=[3, 49])
    batch_sampler = BatchSampler()
    assert [batch_sampler.sample(mx.array(logits), [row]).collect()[0][0] for _ in range(2)] == [60, 3]


def test_greedy_rows_never_pay_for_a_softmax(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    plain_exp = sampler_module.lg.exp_nonpositive

    def counting_exp(x: mx.array) -> mx.array:
        seen.append(x.shape[0])
        return plain_exp(x)

    monkeypatch.setattr(sampler_module.lg, "exp_nonpositive", counting_exp)
    logits = random_logits(6)
    sample_ids(logits, [make_row() for _ in range(6)])
    assert seen == []
    sample_ids(logits, [make_row(temperature=1.0 if i == 3 else 0.0) for i in range(6)])
    assert seen == [1]


def test_xtc_drops_all_but_the_least_of_the_likely() -> None:
    logits = np.full((1, 600), -20.0, dtype=np.float32)
    logits[0, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    always = draw_many(logits[0], SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.15), 2000, 600)
    assert always[0] == always[1] == 0 and always[2] > always[3] > 0
    half = draw_many(logits[0], SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.15), 20_000, 600)
    probs = 0.5 * np.array([0.4, 0.3, 0.2, 0.1]) + 0.5 * np.array([0.0, 0.0, 2 / 3, 1 / 3])
    assert chi_square_is_plausible(half[:4], probs)


def test_equal_logits_are_drawn_equally() -> None:
    """bf16 logits tie often; a tie at the edge of the nucleus is inside as a whole."""
    logits = np.full(4096, -30.0, dtype=np.float32)
    logits[:10] = 0.0
    counts = draw_many(logits, SamplingParams(temperature=1.0, top_p=0.95), 10_000, 4096)
    assert counts[10:].sum() == 0 and chi_square_is_plausible(counts[:10], np.full(10, 0.1))


def test_an_empty_batch_of_rows_is_refused_with_the_counts() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1"):
        BatchSampler().sample(mx.zeros((2, 8)), [make_row(8)])
