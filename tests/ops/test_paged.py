"""A cache in pages means what a whole cache means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.ops import place, shared_leaves

HEADS, DIM, COUNT = 2, 8, 7


def pages_of(seed, size, layers=()):
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.standard_normal((*layers, COUNT, HEADS, size, DIM), np.float32)) for name in "kv"}


def whole(pages, table):
    return {name: jnp.concatenate([leaf[page] for page in table], axis=1) for name, leaf in pages.items()}


def tables(width):
    return st.permutations(range(COUNT)).map(lambda order: np.asarray(order[:width], np.int32))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), size=st.integers(1, 5), table=tables(3), data=st.data())
def test_attention_and_append(seed, size, table, data):
    pos = data.draw(st.integers(-1, 3 * size))
    q, k, v = np.random.default_rng(seed + 1).standard_normal((3, HEADS, DIM), np.float32)
    pages, window = pages_of(seed, size), data.draw(st.none() | st.integers(1, 4))
    paged = mk.append(mk.Paged(pages, table), k, v, pos)
    one = mk.append(whole(pages, table), k, v, pos)
    assert isinstance(paged, mk.Paged) and (paged.table == table).all()
    for name, leaf in whole(paged.pages, table).items():
        np.testing.assert_array_equal(leaf, one[name])
    others = [page for page in range(COUNT) if page not in table]
    assert all((paged.pages[name][page] == pages[name][page]).all() for name in "kv" for page in others)
    np.testing.assert_array_equal(mk.attention(q, paged, pos, window=window), mk.attention(q, one, pos, window=window))


@settings(deadline=None)
@given(entry=st.integers(-3, COUNT + 3), pos=st.integers(-3, 12))
def test_a_place(entry, pos):
    page, row = place(jnp.array([entry, 2], jnp.int32), jnp.int32(pos), COUNT, 4)
    wanted = {0: entry if 0 <= entry < COUNT else COUNT, 1: 2}.get(pos // 4, COUNT)
    assert (int(page), int(row)) == (wanted, pos % 4)


def test_a_page_that_is_not_there_holds_nothing():
    pages = pages_of(0, 4)
    after = mk.append(mk.Paged(pages, np.array([1, COUNT, -1], np.int32)), jnp.ones((HEADS, DIM)), jnp.ones((HEADS, DIM)), 5)
    jax.tree.map(np.testing.assert_array_equal, after.pages, pages)


@pytest.mark.medium
def test_sequences_share_pages():
    """A whole decoder over layers: in a batch, and all tokens of one sequence at once."""
    decoder = tiny.of(tiny.SMOL)
    layers, heads, dim = decoder.shape
    rng = np.random.default_rng(3)
    pages = {name: jnp.asarray(rng.standard_normal((layers, COUNT, heads, 4, dim), np.float32)) for name in "kv"}
    table = np.array([[5, 0], [3, 1], [5, 6]], np.int32)  # the first and the last share a page, and neither appends to it
    cache, params = mk.Paged(pages, table), tiny.float32(decoder.params)
    tokens, positions = np.array([3, 4, 5], np.int32), np.array([4, 7, 6], np.int32)
    axes = mk.batch_axes(cache)
    _, logits, after = jax.jit(jax.vmap(decoder.step, (None, axes, 0, 0), (0, 0, axes)))(params, cache, tokens, positions)
    for i in range(3):
        own = {name: jnp.concatenate([leaf[:, page] for page in table[i]], axis=2) for name, leaf in pages.items()}
        _, expected, own = jax.jit(decoder.step)(params, own, tokens[i], positions[i])
        np.testing.assert_allclose(logits[i], expected, atol=1e-4)
        for name, leaf in own.items():
            np.testing.assert_allclose(after.pages[name][:, table[i, 1]], leaf[:, :, 4:], atol=1e-5)
    one = mk.Paged(pages, table[1])
    _, expected, step = jax.jit(decoder.step)(params, one, tokens[1], positions[1])
    _, logits, filled = jax.jit(mk.prefill(decoder.step))(params, one, tokens[1:2], positions[1:2])
    np.testing.assert_allclose(logits[0], expected, atol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), filled, step)


def test_which_leaves_are_shared():
    kv = {"a": mk.Paged({"k": 1, "v": 2}, 3), "b": (4, 5)}
    assert mk.batch_axes(kv) == {"a": mk.Paged({"k": None, "v": None}, 0), "b": (0, 0)}
    assert shared_leaves(kv) == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (mk.Paged(jnp.zeros((3, 2, 4, 8)), np.zeros(2, np.int32)), "the cache has 1 leaves; kv is a pytree of two arrays, keys then values, or mk.Paged"),
        (mk.Paged((jnp.zeros((2, 4, 8)),) * 2, np.zeros(2, np.int32)), r"cache leaves \(2, 4, 8\) .*they are \[pages, kv_heads, size, head_dim\]"),
        (mk.Paged((jnp.zeros((3, 2, 4, 8)),) * 2, np.zeros((1, 2), np.int32)), r"table.shape=\(1, 2\) .*a sequence's table is int32 \[width\]"),
        (mk.Paged((jnp.zeros((3, 2, 4, 8)),) * 2, np.zeros(0, np.int32)), r"table.shape=\(0,\) .*a sequence's table is int32 \[width\], of a page at least"),
        (mk.Paged((jnp.zeros((3, 2, 4, 8)),) * 2, np.zeros(2, np.float32)), r"table.dtype=dtype\('float32'\); a sequence's table is int32"),
    ],
)  # fmt: skip
def test_caches_that_are_none(cache, message):
    with pytest.raises(ValueError, match=f"mk.attention: .*{message}"):
        mk.attention(jnp.zeros((2, 8)), cache, 0)


def test_pages_with_a_batch_axis():
    pages = jax.tree.map(lambda a: a[None], pages_of(0, 4))
    step = jax.vmap(mk.append, (mk.Paged(0, None), 0, 0, None))
    with pytest.raises(
        ValueError, match=r"mk.append: under vmap the pages have a batch axis; share them: jax.vmap with in_axes of mk.batch_axes"
    ):
        step(mk.Paged(pages, np.zeros(2, np.int32)), jnp.zeros((1, HEADS, DIM)), jnp.zeros((1, HEADS, DIM)), 0)
