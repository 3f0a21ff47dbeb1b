"""The laws that let a schedule cut a streamed axis anywhere: any split, merged in any order, is the whole."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.ops import LINEAR, Attention, Fold

few = settings(max_examples=10, deadline=None)


def log_sum_exp(carry, tile, x):
    top, total = carry
    scores = tile * x
    new = jnp.maximum(top, scores.max(-1))
    return new, total * jnp.exp(top - new) + jnp.exp(scores - new[:, None]).sum(-1)


def merge_log_sum_exp(a, b):
    top = jnp.maximum(a[0], b[0])
    return top, a[1] * jnp.exp(a[0] - top) + b[1] * jnp.exp(b[0] - top)


FOLDS = {
    "linear": LINEAR,
    "largest": Fold(lambda m, tile, x: jnp.maximum(m, (tile * x).max(-1)), (-1e30,), jnp.maximum, lambda m: m, "largest"),
    "log-sum-exp": Fold(log_sum_exp, (-1e30, 0.0), merge_log_sum_exp, lambda c: c[0] + jnp.log(c[1]), "lse"),
    "distance": Fold(lambda s, tile, x: s + ((tile - x) ** 2).sum(-1), (0.0,), jnp.add, jnp.sqrt, "distance"),
}


@st.composite
def cuts(draw, size):
    """Pieces (a, b) that cover range(size)."""
    inner = sorted(draw(st.sets(st.integers(1, size - 1), max_size=5)))
    return list(zip([0, *inner], [*inner, size], strict=True))


def merged(draw, merge, carries):
    """All carries merged, two at a time, in any order."""
    carries = list(carries)
    while len(carries) > 1:
        a = carries.pop(draw(st.integers(0, len(carries) - 1)))
        b = carries.pop(draw(st.integers(0, len(carries) - 1)))
        carries.append(merge(a, b))
    return carries[0]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.medium
@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
@few
@given(data=st.data())
def test_any_split_merged_in_any_order_is_the_whole(fold, data):
    rows, k = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 40))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    tile, x = rng.standard_normal((rows, k)).astype(np.float32), rng.standard_normal(k).astype(np.float32)
    pieces = data.draw(cuts(k))
    whole = fold.finish(fold.step(fold.carry(rows), tile, x))
    apart = [fold.step(fold.carry(rows), tile[:, a:b], x[a:b]) for a, b in pieces]
    close(fold.finish(merged(data.draw, fold.merge, apart)), whole)
    carry = fold.carry(rows)
    for a, b in pieces:
        carry = fold.step(carry, tile[:, a:b], x[a:b])
    close(fold.finish(carry), whole)


@pytest.mark.parametrize("fold", FOLDS.values(), ids=FOLDS)
def test_init_is_the_identity_of_merge(fold):
    rng = np.random.default_rng(0)
    carry = fold.step(fold.carry(3), rng.standard_normal((3, 8)).astype(np.float32), rng.standard_normal(8).astype(np.float32))
    for merged_with_nothing in (fold.merge(carry, fold.carry(3)), fold.merge(fold.carry(3), carry)):
        jax.tree.map(close, merged_with_nothing, carry)


@pytest.mark.medium
@few
@given(data=st.data())
def test_attention_over_any_split_of_its_positions(data):
    kv_heads, group, head_dim = data.draw(st.sampled_from([(1, 1, 8), (2, 3, 4)]))
    context = data.draw(st.sampled_from([2, 12]))
    pos = data.draw(st.integers(0, context - 1))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    op = Attention(0.3, None, data.draw(st.sampled_from([None, 2.0])))
    q = rng.standard_normal((kv_heads, group, head_dim)).astype(np.float32)
    k, v = (rng.standard_normal((kv_heads, context, head_dim)).astype(np.float32) for _ in range(2))
    keep = np.arange(context) <= pos

    def step(a, b):
        return op.step(op.init(kv_heads, group, head_dim), k[:, a:b], v[:, a:b], q, keep[a:b])

    apart = [step(a, b) for a, b in data.draw(cuts(context))]  # among them some of which nothing counts
    close(op.finish(merged(data.draw, op.merge, apart)), op.finish(step(0, context)))


def test_a_fold_of_ones_own():
    rng = np.random.default_rng(1)
    table, x = rng.standard_normal((7, 12)).astype(np.float32), rng.standard_normal(12).astype(np.float32)
    found = mk.fold(log_sum_exp, table, x, init=(-1e30, 0.0), merge=merge_log_sum_exp, finish=lambda c: c[0] + jnp.log(c[1]), name="lse")
    close(found, np.log(np.exp(table * x).sum(-1)))
    batched = jax.jit(jax.vmap(lambda x: mk.fold(log_sum_exp, table, x, init=(-1e30, 0.0), merge=merge_log_sum_exp, finish=lambda c: c[1])))
    assert batched(np.stack([x, 2 * x])).shape == (2, 7)


def test_merge_of_a_single_sum_is_the_default():
    weight, x = np.arange(12.0, dtype=np.float32).reshape(3, 4), np.ones(4, np.float32)
    close(mk.fold(lambda acc, tile, x: acc + mk.dot(tile, x), weight, x), weight.sum(1))
