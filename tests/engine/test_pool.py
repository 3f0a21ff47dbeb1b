"""Decode steps and prefill through pages, against the same on one whole cache; and how many pages a device holds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import models
from mkdsl.engine import PagesError
from mkdsl.engine._paged import PlainStep, empty_pages, paged_fill, pages_that_fit
from mkdsl.ops import Paged, batch_axes, prefill

COUNT, SIZE, WIDTH = 9, 8, 3
TABLES = np.array([[7, 2, 0], [4, 8, 5]], np.int32)  # of two sequences; pages 1, 3 and 6 are nobody's
TOKENS = np.random.default_rng(1).integers(0, 256, (2, SIZE * WIDTH)).astype(np.int32)
UNTOUCHED = 7.0


@pytest.fixture(scope="module")
def params(shape):
    return models.random_params(shape, jax.random.key(7), jnp.float32)


def as_cache(pages, table):
    """One sequence's pages as a whole cache, in numpy."""
    return {name: np.concatenate([np.asarray(leaf[:, page]) for page in table], axis=2) for name, leaf in pages.items()}


def fill(shape, params, pages, table, tokens, positions):
    kv = Paged(pages, np.asarray(table)[None])
    return jax.jit(paged_fill(shape))(params, kv, np.asarray(tokens)[None], positions.astype(np.int32)[None]).pages


def empty(shape):
    return jax.tree.map(lambda a: jnp.full_like(a, UNTOUCHED), empty_pages(shape, count=COUNT, size=SIZE, dtype=jnp.float32))


def filled(shape, params, counts):
    """Pages that held anything, with some tokens of each sequence."""
    pages = empty(shape)
    for table, tokens, count in zip(TABLES, TOKENS, counts, strict=True):
        positions = np.where(np.arange(16) < count, np.arange(16), SIZE * WIDTH)
        pages = fill(shape, params, pages, table, tokens[:16], positions)
    return pages


@pytest.mark.medium
def test_prefill_writes_what_it_writes_into_one_cache(shape, params):
    pages = filled(shape, params, [13, 6])
    for table, tokens, count in zip(TABLES, TOKENS, [13, 6], strict=True):
        kv = models.init_cache(shape, SIZE * WIDTH, dtype=jnp.float32)
        kv = prefill(models.decode_step(shape))(params, kv, tokens[:count], np.arange(count))[-1]
        for name, cache in as_cache(pages, table).items():
            np.testing.assert_allclose(cache[:, :, :count], kv[name][:, :, :count], atol=1e-5)
            assert (cache[:, :, count:] == UNTOUCHED).all()
    assert all((np.asarray(leaf[:, page]) == UNTOUCHED).all() for leaf in pages.values() for page in (1, 3, 6))


@pytest.mark.medium
def test_a_piece_goes_on_from_the_one_before(shape, params):
    whole, pieces = filled(shape, params, [13, 0]), empty(shape)
    for piece in (np.arange(5), np.arange(5, 13)):
        pieces = fill(shape, params, pieces, TABLES[0], TOKENS[0][piece], piece)
    for name, cache in as_cache(pieces, TABLES[0]).items():
        np.testing.assert_allclose(cache, as_cache(whole, TABLES[0])[name], atol=1e-5)


@pytest.mark.medium
def test_a_step_is_what_the_operators_say(shape, params):
    """From within a page over the first position of the next; a sequence that is nowhere writes nothing."""
    cache = Paged(filled(shape, params, [12, 5]), TABLES)
    axes = batch_axes(cache)
    meant = jax.jit(jax.vmap(models.decode_step(shape), (None, axes, 0, 0), (0, 0, axes)))
    ours, theirs, positions = cache, cache, np.array([12, 5], np.int32)
    for i in range(5):
        positions = np.array([12 + i, 5 + i if i < 3 else -1], np.int32)
        tokens = TOKENS[[0, 1], positions]
        logits, ours = jax.jit(PlainStep(shape))(params, ours, tokens, positions)
        _, expected, theirs = meant(params, theirs, tokens, positions)
        seen = positions >= 0
        np.testing.assert_allclose(logits[seen], expected[seen], atol=1e-4)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
    assert (as_cache(ours.pages, TABLES[1])["k"][:, :, 8:] == UNTOUCHED).all()


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_pages_of_all_sequences_at_most(shape, free):
    assert pages_that_fit(shape, size=64, context=100, max_batch=4, free=free) == 8


def test_pages_that_fit_beside_what_prefill_gathers(shape):
    page = 2 * 2 * 2 * 2 * 64 * 8  # keys and values, bytes, layers, kv_heads, positions, head_dim
    free = int(page * (2 * 2 + 5) / 0.9) + 1
    assert pages_that_fit(shape, size=64, context=100, max_batch=4, free=free) == 5


def test_one_sequence_does_not_fit(shape):
    message = r"of 0.0 GiB of free memory 0.0 may be used for the cache, and 0.0 are needed for context=100; lower it"
    with pytest.raises(PagesError, match=message):
        pages_that_fit(shape, size=64, context=100, max_batch=4, free=1000)
