"""Tokens drawn on the device, against a second telling of their distribution: in numpy and float64, by sorting."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mkdsl.engine import SamplingParams
from mkdsl.engine._sampler import NOT_FINITE, Asked, _top_p, sample
from mkdsl.engine._slots import count, empty_slots, occupy

VOCAB, DRAWS = 24, 20_000
LOGITS = np.random.default_rng(3).normal(size=VOCAB).astype(np.float32)
PROMPT, ANSWER = (1, 2, 2, 5), (5, 5, 7, 9)
KINDS = {
    "plain": SamplingParams(),
    "cold": SamplingParams(temperature=0.5),
    "hot": SamplingParams(temperature=2.5),
    "top_k": SamplingParams(top_k=5),
    "top_p": SamplingParams(top_p=0.7),
    "min_p": SamplingParams(min_p=0.2),
    "all three": SamplingParams(temperature=1.7, top_k=12, top_p=0.8, min_p=0.05),
    "repetition": SamplingParams(repetition_penalty=1.8),
    "presence": SamplingParams(presence_penalty=1.5),
    "frequency": SamplingParams(frequency_penalty=-0.7),
    "bias": SamplingParams(logit_bias={0: 2.0, 5: -1.0, 23: -100.0}),
    "everything": SamplingParams(
        temperature=1.3, top_k=15, top_p=0.9, min_p=0.02, repetition_penalty=0.8, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={3: 1.0},
    ),
}  # fmt: skip

pytestmark = pytest.mark.medium
EVERYTHING = Asked.everything()
choose = jax.jit(functools.partial(sample, asked=EVERYTHING))


def scores(logits, params):
    """Logits after the penalties, in float64."""
    x = logits.astype(np.float64)
    for token in range(len(x)):
        if token in PROMPT + ANSWER:
            x[token] *= params.repetition_penalty if x[token] < 0 else 1 / params.repetition_penalty
        x[token] -= params.frequency_penalty * ANSWER.count(token) + params.presence_penalty * (token in ANSWER)
        x[token] += params.logit_bias.get(token, 0)
    return x


def distribution(logits, params):
    x = scores(logits, params) / params.temperature
    p = np.exp(x - x.max())
    p[p < params.min_p * p.max()] = 0
    order = np.argsort(-p)
    p[order[params.top_k :] if params.top_k else []] = 0
    before = np.cumsum(p[order]) - p[order]  # what is more likely than a token
    p[order[before >= params.top_p * p.sum()]] = 0
    return p / p.sum()


def occupied(several, *, seeds=None, prompt=PROMPT, answer=ANSWER, vocab=VOCAB):
    slots = empty_slots(len(several), vocab)
    for row, params in enumerate(several):
        slots = occupy(slots, row, params=params, seed=seeds[row] if seeds else 0, prompt=prompt, ends=(), max_tokens=99)
    for token in answer:
        slots = dataclasses.replace(slots, generated=count(slots.generated, jnp.arange(len(several)), jnp.full(len(several), token)))
    return slots


def draws(params, *, seed=11, first=0, total=DRAWS, logits=LOGITS):
    """One sequence's tokens from `first` on, all from the same logits."""
    several = np.broadcast_to(logits, (total, VOCAB))
    return np.asarray(choose(several, occupied([params], seeds=[seed]), np.zeros(total, np.int32), first + np.arange(total)).token)


@pytest.mark.parametrize("kind", KINDS)
def test_draws_follow_their_distribution(kind):
    expected = distribution(LOGITS, KINDS[kind])
    found = np.bincount(draws(KINDS[kind]), minlength=VOCAB)
    assert not found[expected == 0].any()
    assert scipy.stats.chisquare(found[expected > 0], DRAWS * expected[expected > 0]).pvalue > 1e-3


def test_the_distributions_differ():
    """Else a parameter that does nothing would pass."""
    plain = distribution(LOGITS, KINDS["plain"])
    for kind in KINDS.keys() - {"plain"}:
        assert scipy.stats.chisquare(np.bincount(draws(KINDS[kind]), minlength=VOCAB), DRAWS * plain).pvalue < 1e-6, kind


def test_seeds_are_independent_of_each_other():
    """Across seeds, at one place of the answer, tokens follow the same distribution; two seeds agree as often as chance has it."""
    params, total = KINDS["plain"], 2_000
    slots = jax.tree.map(lambda a: jnp.repeat(a, total, axis=0), occupied([params]))
    keys = jnp.stack([jnp.zeros(total, jnp.uint32), jnp.arange(total, dtype=jnp.uint32)], axis=1)
    slots = dataclasses.replace(slots, knobs=dataclasses.replace(slots.knobs, key=keys))
    found = np.asarray(choose(np.broadcast_to(LOGITS, (total, VOCAB)), slots, np.arange(total), np.full(total, 3)).token)
    expected = distribution(LOGITS, params)
    pooled = np.append(np.flatnonzero(expected * total >= 5), -1)  # chi-squared wants some of each
    counts, wanted = np.bincount(found, minlength=VOCAB), total * expected
    counts, wanted = [np.append(a[pooled[:-1]], a.sum() - a[pooled[:-1]].sum()) for a in (counts, wanted)]
    assert scipy.stats.chisquare(counts, wanted).pvalue > 1e-3
    agree = (draws(params, seed=1) == draws(params, seed=2)).mean()
    assert abs(agree - (expected**2).sum()) < 0.02


@pytest.mark.parametrize("other", [12, 11 + (1 << 32), (1 << 64) - 1])
def test_the_same_seed_gives_the_same_tokens(other):
    """All 64 bits of a seed count."""
    params = KINDS["plain"]
    assert (draws(params, total=100) == draws(params, total=100)).all()
    assert (draws(params, total=100) != draws(params, total=100, seed=other)).any()


def test_a_token_is_its_seeds_and_its_places_alone():
    """Wherever a dispatch begins."""
    params = KINDS["everything"]
    assert (draws(params, total=60)[20:] == draws(params, first=20, total=40)).all()


@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16])
def test_a_token_is_independent_of_the_batch(batch):
    """Whoever else there is, of whatever kind, and in whichever place."""
    kinds, rng = [*KINDS.values(), SamplingParams(temperature=0), SamplingParams(logprobs=3)], np.random.default_rng(batch)
    slots = occupied(kinds, seeds=range(len(kinds)))
    logits = rng.normal(size=(len(kinds), 100, VOCAB)).astype(np.float32)
    alone = [choose(logits[row], slots, np.full(100, row), np.arange(100)).token for row in range(len(kinds))]
    for _ in range(30):
        rows, index = rng.integers(0, len(kinds), batch), rng.integers(0, 100, batch)
        together = choose(logits[rows, index], slots, rows, index).token
        assert [int(token) for token in together] == [int(alone[row][i]) for row, i in zip(rows, index, strict=True)]


@pytest.mark.parametrize("kind", [*KINDS, "greedy"])
def test_what_is_not_asked_for_need_not_be_computed(kind):
    params = KINDS.get(kind) or SamplingParams(temperature=0, top_k=3, top_p=0.5)
    asked, args = Asked.of([params]), (np.broadcast_to(LOGITS, (100, VOCAB)), occupied([params]), np.zeros(100, np.int32), np.arange(100))
    assert asked != EVERYTHING
    assert (sample(*args, asked=asked).token == choose(*args).token).all()


@pytest.mark.parametrize(
    ("params", "asked"),
    [
        (SamplingParams(temperature=0, top_k=5, top_p=0.5), set()),
        (SamplingParams(), {"draws"}),
        (SamplingParams(top_k=5), {"draws", "top_k"}),
        (SamplingParams(top_p=0.5, logprobs=0), {"draws", "top_p", "logprobs"}),
        (SamplingParams(temperature=0, logit_bias={1: 2.0}), {"changes"}),
        (SamplingParams(temperature=0, presence_penalty=0.1), {"changes"}),
    ],
)
def test_what_is_asked_for(params, asked):
    assert {name for name, is_asked in dataclasses.asdict(Asked.of([params])).items() if is_asked} == asked


@pytest.mark.parametrize("kind", ["plain", "repetition", "presence", "frequency", "bias", "everything"])
def test_greedy_takes_the_most_likely_after_penalties(kind):
    params = dataclasses.replace(KINDS[kind], temperature=0, top_k=None, top_p=1.0, min_p=0.0)
    logits = np.random.default_rng(5).normal(size=(200, VOCAB)).astype(np.float32)
    found = choose(logits, occupied([params]), np.zeros(200, np.int32), np.arange(200)).token
    assert found.tolist() == [scores(row, params).argmax() for row in logits]


def test_greedy_of_equals_is_the_lowest():
    assert (
        choose(np.zeros((1, VOCAB), np.float32), occupied([SamplingParams(temperature=0)]), np.zeros(1, int), np.zeros(1, int)).token == 0
    )


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-40])
def test_next_to_no_temperature(temperature):
    assert set(draws(SamplingParams(temperature=temperature), total=100).tolist()) == {LOGITS.argmax()}


def test_ties_with_the_last_one_kept_are_kept():
    logits = np.float32([3, 1, 1, 1] + [0] * (VOCAB - 4))
    for params in (SamplingParams(top_k=2), SamplingParams(top_p=0.5)):  # the first alone has 0.42, the first two 0.47
        assert set(draws(params, total=3_000, logits=logits).tolist()) == {0, 1, 2, 3}


def test_all_of_the_probability_is_all_of_the_tokens():
    """Though the sum of the first rounds to the whole."""
    scores = jnp.full((1, VOCAB), -20.0).at[0, 3].set(0.0)
    assert _top_p(scores, jnp.ones(1)).all()


def test_one_token_is_left_at_least():
    for params in (SamplingParams(top_k=1), SamplingParams(top_p=1e-9), SamplingParams(min_p=1.0)):
        assert set(draws(params, total=100).tolist()) == {LOGITS.argmax()}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=VOCAB, max_size=VOCAB),
    st.integers(1, VOCAB + 3),
    st.floats(0.01, 1.0),
    st.floats(0.0, 1.0),
)
def test_no_token_outside_what_counts(logits, top_k, top_p, min_p):
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p)
    logits = np.float32(logits)
    x = scores(logits, params)
    smallest = x[distribution(logits, params) > 0].min()
    assert x[draws(params, total=200, logits=logits)].min() >= smallest - 1e-3  # ties, and sums that round


@pytest.mark.slow
def test_unlikely_tokens_are_drawn_as_often_as_they_should_be():
    """With logits 17 below the likeliest. Noise from a single uniform float32 ends at 16, and they would come ten times too seldom."""
    vocab, batch, calls = 1 << 14, 256, 36
    slots = occupied([SamplingParams()], vocab=vocab)
    logits = np.broadcast_to(np.where(np.arange(vocab) == 0, 0, -17).astype(np.float32), (batch, vocab))
    tokens = [choose(logits, slots, np.zeros(batch, np.int32), np.arange(batch) + batch * call).token for call in range(calls)]
    expected = batch * calls * (vocab - 1) * np.exp(-17) / (1 + (vocab - 1) * np.exp(-17))
    assert scipy.stats.poisson.sf(np.count_nonzero(tokens) - 1, expected) < 0.99
    assert scipy.stats.poisson.cdf(np.count_nonzero(tokens), expected) > 1e-2


def test_the_largest_vocabularies():
    """131,072 equal tokens."""
    vocab, total = 1 << 17, 64
    slots = occupied([SamplingParams()], vocab=vocab)
    found = np.asarray(choose(np.zeros((total, vocab), np.float32), slots, np.zeros(total, np.int32), np.arange(total)).token)
    assert scipy.stats.kstest(found / vocab, "uniform").pvalue > 1e-3
    assert len(set(found.tolist())) == total


@pytest.mark.parametrize(("tokens", "value"), [(4, np.nan), (4, np.inf), (slice(None), -np.inf)])
def test_logits_that_are_no_numbers(tokens, value):
    logits = np.stack([LOGITS, LOGITS])
    logits[1, tokens] = value
    for params in (KINDS["plain"], SamplingParams(temperature=0, logprobs=1)):
        token = choose(logits, occupied([params]), np.zeros(2, int), np.zeros(2, int)).token
        assert token[1] == NOT_FINITE and token[0] >= 0


def test_logprobs_are_the_models_own():
    params = dataclasses.replace(KINDS["everything"], logprobs=4)
    found = choose(np.stack([LOGITS] * 3), occupied([params]), np.zeros(3, int), np.arange(3))
    expected = LOGITS - np.log(np.exp(LOGITS.astype(np.float64)).sum())
    np.testing.assert_allclose(found.logprobs.logprob, expected[np.asarray(found.token)], atol=1e-5)
    assert found.logprobs.top_tokens[0].tolist() == np.argsort(-LOGITS, stable=True)[:20].tolist()
    np.testing.assert_allclose(found.logprobs.top_logprobs[0], np.sort(expected)[::-1][:20], atol=1e-5)


def test_a_new_sequence_knows_nothing_of_the_one_before():
    slots = occupied([KINDS["everything"]])
    slots = occupy(slots, 0, params=KINDS["plain"], seed=11, prompt=(3,), ends=(4, 6), max_tokens=5)
    fresh = occupy(empty_slots(1, VOCAB), 0, params=KINDS["plain"], seed=11, prompt=(3,), ends=(4, 6), max_tokens=5)
    jax.tree.map(np.testing.assert_array_equal, slots, fresh)
    assert np.flatnonzero(slots.ends[0]).tolist() == [4, 6]


def test_a_row_past_the_slots_counts_nothing():
    generated = count(occupied([KINDS["plain"]]).generated, jnp.array([1, 0]), jnp.array([3, 4]))
    assert generated[0].tolist() == [ANSWER.count(t) + (t == 4) for t in range(VOCAB)]
