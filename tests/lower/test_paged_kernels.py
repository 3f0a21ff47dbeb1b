"""Interpreted kernels that read a cache through a table of pages."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, TOLERANCE, changed, with_tiles

import mkdsl as mk
from mkdsl.proof import ScheduleError, verify_schedule
from mkdsl.search import search

COUNT, SIZE, WIDTH = 9, 64, 2
TABLE = np.array([[3, 1], [7, 2], [5, COUNT]], np.int32)  # the last has one page only
POSITIONS, TOKENS = np.array([70, 127, 63], np.int32), np.array([3, 4, 5], np.int32)


def paged(decoder, batch, size=SIZE, seed=0):
    rng, (layers, heads, dim) = np.random.default_rng(seed), decoder.shape
    pages = {name: jnp.asarray(rng.standard_normal((layers, COUNT, heads, size, dim)), jnp.bfloat16) for name in "kv"}
    return mk.Paged(pages, TABLE[:batch])


def check(decoder, cache, tokens, positions, got):
    axes = mk.batch_axes(cache)
    step = jax.jit(jax.vmap(decoder.step, (None, axes, 0, 0), (0, 0, axes)))
    _, logits, after = step(tiny.float32(decoder.params), dataclasses.replace(cache, pages=tiny.float32(cache.pages)), tokens, positions)
    error = jnp.linalg.norm(got[1] - logits, axis=1) / jnp.linalg.norm(logits, axis=1)
    assert float(error.max()) < TOLERANCE
    assert (got[2].table == cache.table).all()
    for ours, theirs, before in zip(*map(jax.tree.leaves, (got[2].pages, after.pages, cache.pages)), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.1, rtol=0.05)
        size = before.shape[3]
        written = {(cache.table[i, p // size], p % size) for i, p in enumerate(positions) if p >= 0}
        assert {tuple(at) for at in np.argwhere(np.asarray(ours != before).any((0, 2, 4)))} == written


def run(decoder, cache, tokens, positions):
    """The kernels of the searched schedule, at any positions."""
    lowered = mk.jit(decoder.step, batch=len(tokens), target=SMALL, interpret=True).lower(decoder.params, cache, tokens, positions)
    return lowered.compile().executable(decoder.params, cache, tokens, positions)


@pytest.mark.medium
@pytest.mark.usefixtures("race_detector")
def test_it_computes_what_the_operators_say():
    decoder = tiny.of(dataclasses.replace(tiny.SMOL, layers=1))
    cache = paged(decoder, 3)
    check(decoder, cache, TOKENS, POSITIONS, run(decoder, cache, TOKENS, POSITIONS))


@pytest.mark.slow
@pytest.mark.usefixtures("race_detector")
def test_who_is_nowhere_writes_nothing():
    decoder = tiny.of(tiny.SMOL)
    cache = paged(decoder, 2)
    got = run(decoder, cache, TOKENS[:2], np.array([-1, 64], np.int32))
    assert np.isnan(got[1][0]).all()
    check(decoder, dataclasses.replace(cache, table=cache.table[1:]), TOKENS[1:2], np.array([64], np.int32), of_sequence(got, 1))


def of_sequence(got, i):
    return got[0][i : i + 1], got[1][i : i + 1], dataclasses.replace(got[2], table=got[2].table[i : i + 1])


@pytest.mark.slow
@pytest.mark.usefixtures("race_detector")
def test_blocks_of_two_pages():
    """Each half of them in a page of its own, behind or before the other's."""
    decoder = tiny.of(dataclasses.replace(tiny.SMOL, layers=1))
    cache = dataclasses.replace(paged(decoder, 2, 128), table=np.array([[3, 1], [2, 7]], np.int32))
    tokens, positions = TOKENS[:2], np.array([255, 130], np.int32)
    found = mk.jit(decoder.step, batch=2, target=SMALL, interpret=True).trace(decoder.params, cache, tokens, positions)
    schedule = with_tiles(found.graph, 2, attention={"block": 256})
    check(decoder, cache, tokens, positions, found.lower(schedule=schedule).compile()(decoder.params, cache, tokens, positions))


@pytest.mark.slow
@pytest.mark.usefixtures("race_detector")
def test_one_sequence_without_a_batch_axis():
    decoder = tiny.of(dataclasses.replace(tiny.SMOL, layers=1))
    cache = paged(decoder, 1)
    one = dataclasses.replace(cache, table=cache.table[0])
    got = mk.jit(decoder.step, target=SMALL, interpret=True)(decoder.params, one, TOKENS[0], POSITIONS[0])
    check(decoder, cache, TOKENS[:1], POSITIONS[:1], (got[0][None], got[1][None], dataclasses.replace(got[2], table=got[2].table[None])))


def graph_of(size, width=WIDTH):
    decoder = tiny.of(tiny.SMOL)
    cache = dataclasses.replace(paged(decoder, 1, size), table=np.zeros(width, np.int32))
    return mk.jit(decoder.step, target=SMALL).trace(decoder.params, cache, TOKENS[0], POSITIONS[0]).graph


@pytest.mark.parametrize(("size", "width", "blocks"), [(64, 4, {64, 128}), (64, 3, {64}), (128, 2, {64, 128, 256})])
def test_a_copy_reads_one_page(size, width, blocks):
    """Blocks that a schedule may have; others are refused by the proof."""
    graph = graph_of(size, width)
    schedule = search(graph, batch=1, target=SMALL, cache=False)
    for block in (64, 128, 256, 512):
        plan = dataclasses.replace(schedule.plan("attention"), block=block)
        assert plan.meets_pages(graph.phase("attention")) == (block in blocks)
    with pytest.raises(ScheduleError, match=f"halves of block=512 do not lie in pages of {size} of context={size * width}"):
        verify_schedule(graph, changed(graph, schedule, block=512, splits=1, cluster=1), SMALL)


def test_pages_that_no_kernel_reads():
    with pytest.raises(mk.UnsupportedError, match=r"pages of size=40; kernels read pages of a multiple of 64 positions"):
        graph_of(40)
