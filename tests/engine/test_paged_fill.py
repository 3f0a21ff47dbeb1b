"""Prefill of several sequences in pages, against that of each in one whole cache."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import models
from mkdsl.engine._paged import empty_pages, paged_fill
from mkdsl.ops import Paged, prefill

COUNT, SIZE, WIDTH = 9, 8, 3
PAST = SIZE * WIDTH
TABLES = np.array([[7, 2, 0], [0, 0, 0], [4, 8, 5]], np.int32)  # the second is of nobody
TOKENS = np.random.default_rng(1).integers(0, 256, (3, PAST)).astype(np.int32)


@pytest.fixture(scope="module")
def params(shape):
    return models.random_params(shape, jax.random.key(7), jnp.float32)


@pytest.fixture(scope="module")
def fill(shape):
    return jax.jit(paged_fill(shape))


def anything(shape):
    empty = empty_pages(shape, count=COUNT, size=SIZE, dtype=jnp.float32)
    return jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.ndim), a.shape), empty)


def as_cache(pages, table):
    """One sequence's pages as a whole cache."""
    return {name: np.concatenate([np.asarray(leaf[:, page]) for page in table], axis=2) for name, leaf in pages.items()}


def some(starts, counts, n=16):
    """The tokens and positions of a piece, with pads."""
    at = [[*range(start, start + count), *[PAST] * (n - count)] for start, count in zip(starts, counts, strict=True)]
    positions = np.array(at, np.int32)
    return np.take_along_axis(TOKENS, np.minimum(positions, PAST - 1), 1), positions


@pytest.mark.medium
@pytest.mark.parametrize(("starts", "counts"), [((0, 0, 0), (13, 0, 6)), ((8, 0, 16), (16, 0, 8)), ((3, 0, 23), (7, 0, 1))])
def test_each_is_written_as_if_it_were_alone(shape, params, fill, starts, counts):
    """Wherever it begins in a page; and nothing else of all pages changes."""
    before = anything(shape)
    tokens, positions = some(starts, counts)
    after = fill(params, Paged(before, TABLES), tokens, positions).pages
    expected = {name: np.array(leaf) for name, leaf in before.items()}
    step = jax.jit(lambda *args: prefill(models.decode_step(shape))(*args)[-1])
    for i in (0, 2):
        kv = step(params, as_cache(before, TABLES[i]), tokens[i], positions[i])
        for name, leaf in expected.items():
            for number, page in enumerate(TABLES[i]):
                leaf[:, page] = kv[name][:, :, number * SIZE : (number + 1) * SIZE]
    for name, leaf in expected.items():
        np.testing.assert_allclose(after[name], leaf, atol=1e-5)
        same = [page for page in range(COUNT) if page not in TABLES[[0, 2]]]
        np.testing.assert_array_equal(after[name][:, same], before[name][:, same])


@pytest.mark.medium
def test_a_table_of_the_pages_that_are_filled(shape, params, fill):
    """A pad stays one where the table is shorter."""
    tokens, positions = some((0, 0, 0), (13, 0, 6))
    short, whole = (fill(params, Paged(anything(shape), tables), tokens, positions).pages for tables in (TABLES[:, :2], TABLES))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), short, whole)
