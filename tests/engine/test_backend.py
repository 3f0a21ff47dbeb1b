"""Pieces of a prompt, as the device gets them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import models
from mkdsl.engine import _backend
from mkdsl.engine._backend import Backend, Piece


@pytest.fixture
def backend(shape):
    """With a table of four pages of 64 positions."""
    params = models.random_params(shape, jax.random.key(1))
    return Backend(shape, params, pages=6, page_size=64, context=256, max_batch=1, steps=1, step_of=lambda _: None)


@pytest.mark.parametrize(("length", "size"), [(1, 16), (15, 16), (16, 16), (17, 32), (33, 64), (100, 128)])
@pytest.mark.parametrize("start", [0, 70])
def test_pieces_are_padded_to_powers_of_two(backend, monkeypatch, length, size, start):
    """So that few are ever compiled. Pads lie past the table."""
    seen = []
    monkeypatch.setattr(
        _backend, "_fill", lambda params, pages, table, tokens, positions, **_: seen.append((tokens, positions)) or (pages, None)
    )
    backend.prefill([Piece(tokens=range(5, 5 + length), start=start, pages=[3, 1, 2])])
    (((tokens,), (positions,)),) = seen
    assert len(tokens) == len(positions) == size
    assert tokens[:length].tolist() == list(range(5, 5 + length))
    assert positions.tolist() == [*range(start, start + length), *[256] * (size - length)]


@pytest.mark.medium
def test_pads_write_nothing(backend):
    backend.prefill([Piece(tokens=range(50), start=0, pages=[3])])
    for pages in jax.tree.leaves(backend._pages):
        written = np.asarray(jnp.abs(pages.astype(jnp.float32)).sum((0, 2, 4)) > 0)  # [pages, positions]
        assert written[3, :50].all() and not written[3, 50:].any()
        assert not np.delete(written, 3, axis=0).any()
