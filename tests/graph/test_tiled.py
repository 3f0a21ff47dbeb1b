"""How wide vectors are laid out."""

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.graph import FoldPhase, build_graph, tiled

HEAD_DIMS = st.frozensets(st.integers(4, 16).map(lambda n: 16 * n), max_size=2)


@given(st.integers(1, 5000), HEAD_DIMS)
def test_whole_tiles_and_whole_heads(width, head_dims):
    wide = tiled(width, head_dims)
    assert wide >= width
    assert wide % 64 == 0
    assert all(wide % d == 0 for d in head_dims if width % d == 0)
    assert wide == width or width % 64
    assert tiled(wide, head_dims) == wide


@given(st.integers(1, 5000))
def test_no_tile_in_vain(width):
    assert tiled(width) - width < 64


def phase_of(rows: int, k: int, layers: int) -> FoldPhase:
    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(lambda x, p, kv, pos: (x + mk.linear(p["out"], mk.linear(p["w"], x)), kv), x, params["layers"], kv, pos)
        return mk.linear(params["head"], x), kv

    shapes = {"embed": (8, k), "head": (64, k), "layers": {"w": (layers, rows, k), "out": (layers, k, rows)}}
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), shapes, is_leaf=lambda s: isinstance(s, tuple))
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    graph, _ = build_graph(step, params, {}, scalar, scalar)
    return next(p for p in graph.phases if isinstance(p, FoldPhase) and p.name == "w")


@pytest.mark.medium
@given(st.integers(2, 200), st.integers(2, 200), st.integers(2, 3))
def test_rows_of_every_layer_begin_a_block(rows, k, layers):
    """As many layers as it takes to make a multiple of 8 are no help: each layer's tiles are counted from its own first row."""
    phase = phase_of(rows, k, layers)
    assert phase.k == tiled(k)
    assert phase.rows == tiled(rows)
    assert [s for s in (1, 2, 4, 8) if phase.in_place(s)] == [s for s in (1, 2, 4, 8) if rows % (8 // s) == 0]
