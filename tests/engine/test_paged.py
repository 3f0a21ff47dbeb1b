"""The paged decode step and prefill, against the same on one whole cache; and how many pages a device holds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import models
from mkdsl.engine import PagesError
from mkdsl.engine._paged import BatchedStep, empty_pages, gathered, paged_fill, pages_that_fit, written_back
from mkdsl.ops import prefill

COUNT, SIZE, WIDTH = 9, 8, 3
TABLES = np.array([[7, 2, 0], [4, 8, 5]], np.int32)  # of two sequences; pages 1, 3 and 6 are nobody's
TOKENS = np.random.default_rng(1).integers(0, 256, (2, SIZE * WIDTH)).astype(np.int32)


@pytest.fixture(scope="module")
def params(shape):
    return models.random_params(shape, jax.random.key(7), jnp.float32)


def as_cache(pages, table):
    """One sequence's pages as a whole cache, in numpy."""
    return {name: np.concatenate([np.asarray(leaf[page]) for page in table], axis=2) for name, leaf in pages.items()}


def fill(shape, params, pages, table, tokens, positions):
    return jax.jit(paged_fill(shape))(params, pages, table, tokens, positions.astype(np.int32))


def filled(shape, params, counts):
    """Pages that held anything, with some tokens of each sequence."""
    pages = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), empty_pages(shape, count=COUNT, size=SIZE, dtype=jnp.float32))
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
            assert np.isnan(cache[:, :, count:]).all()
    assert all(np.isnan(leaf[page]).all() for leaf in pages.values() for page in (1, 3, 6))


@pytest.mark.medium
def test_a_piece_goes_on_from_the_one_before(shape, params):
    whole, pieces = (filled(shape, params, [13, 0]) for _ in range(2))
    pieces = jax.tree.map(lambda a: jnp.full_like(a, jnp.nan), pieces)
    for piece in (np.arange(5), np.arange(5, 13)):
        pieces = fill(shape, params, pieces, TABLES[0], TOKENS[0][piece], piece)
    for name, cache in as_cache(pieces, TABLES[0]).items():
        np.testing.assert_allclose(cache, as_cache(whole, TABLES[0])[name], atol=1e-5)


def several(shape, params, pages, tables, tokens, positions):
    """Steps [steps, b] of tokens: (logits of each, pages)."""
    kv, out = gathered(pages, tables, positions), []
    for i, token in enumerate(tokens):
        logits, kv = BatchedStep(shape)(params, kv, token, positions + i)
        out.append(logits)
    return out, written_back(pages, tables, kv, positions, jnp.full(len(tables), len(tokens)), most=len(tokens))


@pytest.mark.medium
def test_a_step_is_each_sequences_own(shape, params):
    """From within a page over the first position of the next."""
    pages, positions = filled(shape, params, [12, 5]), np.array([12, 5], np.int32)
    step, alone = jax.jit(functools.partial(several, shape)), jax.jit(models.decode_step(shape))
    caches = [jax.tree.map(jnp.nan_to_num, as_cache(pages, table)) for table in TABLES]
    for _ in range(2):
        tokens = np.stack([TOKENS[[0, 1], positions + i] for i in range(4)])
        every, pages = step(params, pages, TABLES, tokens, positions)
        for i in range(2):
            for token, logits in zip(tokens, every, strict=True):
                _, expected, caches[i] = alone(params, caches[i], token[i], positions[i])
                np.testing.assert_allclose(logits[i], expected, atol=1e-4)
                positions[i] += 1
    for table, kv, count in zip(TABLES, caches, positions, strict=True):
        jax.tree.map(lambda a, b, n=count: np.testing.assert_allclose(a[:, :, :n], b[:, :, :n], atol=1e-4), as_cache(pages, table), kv)


@pytest.mark.parametrize(("first", "counts", "written"), [(0, (0, 1), {4}), (6, (4, 2), {7, 2, 4}), (20, (9, 0), {0})])
def test_only_what_is_new_is_written_back(shape, first, counts, written):
    """At the end of a table as well: what lies past it is nobody's."""
    pages = empty_pages(shape, count=COUNT, size=SIZE, dtype=jnp.float32)
    kv = jax.tree.map(jnp.ones_like, gathered(pages, TABLES, np.zeros(2, np.int32)))
    after = written_back(pages, TABLES, kv, np.full(2, first, np.int32), np.array(counts, np.int32), most=9)
    assert {page for page in range(COUNT) if np.asarray(after["k"][page]).any()} == written
    rows = sum(min(n, SIZE * WIDTH - first) for n in counts)
    assert int(after["v"].sum()) == rows * shape.layers * shape.kv_heads * shape.head_dim


@pytest.mark.parametrize("free", [None, 1 << 40])
def test_pages_of_all_sequences_at_most(shape, free):
    assert pages_that_fit(shape, size=64, context=100, max_batch=4, free=free) == 8


def test_pages_that_fit_beside_what_is_gathered(shape):
    page = 2 * 2 * 2 * 2 * 64 * 8  # keys and values, bytes, layers, kv_heads, positions, head_dim
    free = int(page * (2 * 8 + 5) / 0.9) + 1
    assert pages_that_fit(shape, size=64, context=100, max_batch=4, free=free) == 5


def test_one_sequence_does_not_fit(shape):
    message = r"of 0.0 GiB of free memory 0.0 may be used for the cache, and 0.0 are needed for context=100 with max_batch=4; lower one"
    with pytest.raises(PagesError, match=message):
        pages_that_fit(shape, size=64, context=100, max_batch=4, free=1000)
