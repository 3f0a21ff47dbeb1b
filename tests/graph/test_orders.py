"""Orders of phases: each is the same decode step, and the names of its phases say which it is. What attention's inputs may be in them."""

import collections

import jax
import jax.numpy as jnp
import pytest
import random_decoders
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.graph import OpGraph, UnsupportedError, build_graph, verify_graph

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def weights(graph: OpGraph):
    return collections.Counter((p.segment, w) for p in graph.phases for part in p.parts for w in part.weights)


@settings(max_examples=25, deadline=None)
@given(random_decoders.steps(), st.integers(1, 3))
def test_every_order_is_the_same_step(step, layers):
    """It verifies, its weights and outputs are the same, and its names tell it from all others."""
    graph = random_decoders.traced(step, layers)
    for other in graph.others:
        verify_graph(other)
        assert weights(other) == weights(graph)
        assert sorted(other.output_of) == sorted(graph.output_of)
        assert {t.name for t in other.tensors.values() if t.carried} == {"x"}
        assert graph.in_order(tuple(other.order)) is other
    assert graph.in_order(tuple(graph.order)) is graph


def two_branches(params, kv, token, pos):
    """Each of two folds, one after the other; both with weights of the same names."""
    x = mk.embed(params["embed"], token)
    a, b = (mk.linear(params[name]["out"], jnp.tanh(mk.linear(params[name]["in"], f(x)))) for name, f in (("a", jnp.sin), ("b", jnp.cos)))
    return mk.linear(params["embed"], x + a + b), kv


def test_of_orders_whose_phases_have_the_same_names_there_is_one():
    """Regression: a schedule of the second was taken for one of the first."""
    leaf = random_decoders.leaf
    params = {"embed": leaf(128, 64)} | {name: {"in": leaf(n, 64), "out": leaf(64, n)} for name, n in (("a", 128), ("b", 192))}
    graph = build_graph(two_branches, params, (), SCALAR, SCALAR)[0]
    assert [tuple(g.order)[:4] for g in (graph, *graph.others)] == [("in", "in.2", "out", "out.2"), ("in", "out", "in.2", "out.2")]
    assert [p.k for p in graph.phases[:4]] == [64, 64, 128, 192]


def attend(params, kv, token, pos, q=lambda q: q, v=lambda v, token: v):
    x = mk.embed(params["embed"], token)
    heads = [mk.heads(a, n) for a, n in ((q(mk.linear(params["wq"], x)), 2), (mk.linear(params["wk"], x), 1))]
    kv = mk.append(kv, heads[1], mk.heads(v(mk.linear(params["wv"], x), mk.embed(params["values"], token)), 1), pos)
    return mk.linear(params["wo"], mk.attention(heads[0], kv, pos)), kv


ATTEND = {"embed": (64, 64), "values": (64, 64), "wq": (128, 64), "wk": (64, 64), "wv": (64, 64), "wo": (64, 128)}
ATTEND = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in ATTEND.items()}
CACHE = (jax.ShapeDtypeStruct((1, 64, 64), jnp.bfloat16),) * 2


def test_a_finish_adds_a_tables_row_to_what_attention_reads():
    graph = build_graph(lambda *args: attend(*args, v=lambda v, row: v + row), ATTEND, CACHE, SCALAR, SCALAR)[0]
    assert graph.phase("wq+wk+wv").parts[2].writes == ("wv",)


def test_a_norm_over_all_heads_before_attention_is_refused():
    """Regression: it was computed head by head."""
    with pytest.raises(
        UnsupportedError, match=r"reduce\[\] cannot be computed for attention's heads; apply it before the projection, or to"
    ):
        build_graph(lambda *args: attend(*args, q=mk.rms_norm), ATTEND, CACHE, SCALAR, SCALAR)


def test_an_order_without_a_lowering_is_none():
    """The norm over all heads belongs to the finish of w2, if that comes after wq; else attention would have to compute it."""

    def step(params, kv, token, pos):
        also = mk.linear(params["w2"], jnp.tanh(mk.embed(params["embed"], token)))
        return attend(params, kv, token, pos, q=lambda q: mk.rms_norm(q) + also)

    graph = build_graph(step, ATTEND | {"w2": random_decoders.leaf(128, 64)}, CACHE, SCALAR, SCALAR)[0]
    assert [tuple(g.order) for g in (graph, *graph.others)] == [("wq+wk+wv", "w2", "attention", "wo")]
