"""The forms of a decode step: other orders, other values that cross; the same computation in each."""

import collections

import jax
import jax.numpy as jnp
import pytest
import random_decoders
import tiny_decoders as tiny
from hypothesis import given, settings

import mkdsl as mk
from mkdsl.graph import OpGraph, UnsupportedError, build_graph, form_of, neighbours, orders, verify_graph

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def graph_of(decoder):
    return build_graph(decoder.step, decoder.params, decoder.cache(64), SCALAR, SCALAR)[0]


def by_tensors(graph):
    """{what crosses only then: form}."""
    return {tuple(name for name in g.tensors if name not in graph.tensors): g for g in neighbours(graph)}


def names(graph):
    return [p.name for p in graph.phases]


def test_neighbours_of_a_llama():
    forms = by_tensors(graph_of(tiny.of(tiny.LLAMA)))
    assert set(forms) == {("wq+wk+wv.in",), ("wo.raw",), ("wg.raw", "wu.raw"), ("wg+wu.in",), ("wd.raw",), ("lm_head.in",)}


def test_gate_and_up_cross_and_their_reader_multiplies_them():
    graph = by_tensors(graph_of(tiny.of(tiny.LLAMA)))["wg.raw", "wu.raw"]
    assert [(p.weights, p.writes) for p in graph.phase("wg+wu").parts] == [(("wg",), ("wg.raw",)), (("wu",), ("wu.raw",))]
    assert graph.phase("wd").reads == ("wg.raw", "wu.raw")
    assert not graph.tensors["wg.raw"].rounds and "wg·wu" not in graph.tensors
    assert len(graph.code["wg+wu"].stats) == 1  # 1/rms belongs to what the folds give


def test_a_residual_is_added_by_all_who_read_it():
    graph = by_tensors(graph_of(tiny.of(tiny.LLAMA)))[("wo.raw",)]
    assert (graph.phase("wo").writes, graph.phase("wo").row_reads) == (("wo.raw",), ())
    assert graph.phase("wg·wu").reads == ("wo.raw", "x")
    assert graph.phase("wd").row_reads == ("wo.raw", "x")


def test_loop_state_that_no_finish_writes_is_written_by_a_map():
    graph = by_tensors(graph_of(tiny.of(tiny.LLAMA)))[("wd.raw",)]
    assert graph.segments[1].phases[-2:] == ("wd", "map.2")
    assert [p.name for p in graph.writers["x"]] == ["map", "map.2"]
    assert graph.phase("map.2").row_reads == ("wd.raw", "wo")


def test_a_resident_is_written_by_the_finish_before():
    graph = by_tensors(graph_of(tiny.of(tiny.LLAMA)))[("wg+wu.in",)]
    assert graph.phase("wo").writes == ("wo", "wg+wu.in")
    assert graph.tensors["wg+wu.in"].rounds
    assert graph.phase("wg·wu").reads == ("wg+wu.in", "wo")  # the sum, for its rms


def test_a_resident_that_no_finish_can_compute_is_written_by_a_map():
    graph = by_tensors(graph_of(tiny.parallel()))[("wq+wk+wv+wi.in",)]
    assert graph.segments[1].phases[:2] == ("wq+wk+wv+wi.in", "wq+wk+wv+wi")
    first, fold = map(graph.phase, graph.segments[1].phases[:2])
    assert (first.kind, first.reads, first.reductions, first.writes) == ("map", ("x",), 2, ("wq+wk+wv+wi.in",))
    assert (fold.reads, fold.reductions, fold.separable) == (("wq+wk+wv+wi.in",), 0, True)
    assert not graph_of(tiny.parallel()).phase("wq+wk+wv+wi").separable
    assert graph.tensors["wq+wk+wv+wi.in"].rounds


@pytest.mark.parametrize("decoder", [tiny.of(tiny.QWEN3), tiny.parallel(), tiny.gemma()], ids=["qwen3", "parallel", "gemma"])
def test_neighbours_are_mutual(decoder):
    graph = graph_of(decoder)
    for other in neighbours(graph):
        assert any(back.to_json() == graph.to_json() for back in neighbours(other))


def two_stacks(params, kv, token, pos):
    layer = lambda x, w, kv, pos: (x + mk.linear(w, mk.rms_norm(x)), kv)  # noqa: E731
    x = mk.embed(params["embed"], token)
    for stack in ("first", "second"):
        x, _ = mk.layers(layer, x, params[stack]["w"], None, pos)
    return mk.linear(params["embed"], x), kv


def test_weights_of_one_name_cross_under_two():
    leaf = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    params = {"embed": leaf(128, 64), "first": {"w": leaf(3, 64, 64)}, "second": {"w": leaf(3, 64, 64)}}
    graph = build_graph(two_stacks, params, (), SCALAR, SCALAR)[0]
    assert set(by_tensors(graph)) >= {("w.raw",), ("w.2.raw",)}
    for form in neighbours(graph):
        assert form_of(graph, names(form), list(form.tensors)).form == form.form


def attend(params, kv, token, pos, q=lambda q: q, v=lambda v, token: v):
    x = mk.embed(params["embed"], token)
    heads = [mk.heads(a, n) for a, n in ((q(mk.linear(params["wq"], x)), 2), (mk.linear(params["wk"], x), 1))]
    kv = mk.append(kv, heads[1], mk.heads(v(mk.linear(params["wv"], x), mk.embed(params["values"], token)), 1), pos)
    return mk.linear(params["wo"], mk.attention(heads[0], kv, pos)), kv


ATTEND = {"embed": (64, 64), "values": (64, 64), "wq": (128, 64), "wk": (64, 64), "wv": (64, 64), "wo": (64, 128)}
ATTEND = {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in ATTEND.items()}
CACHE = (jax.ShapeDtypeStruct((1, 64, 64), jnp.bfloat16),) * 2


def test_what_attention_cannot_compute_does_not_cross_before_it():
    """A table's row that is added to values: the finish adds it, attention could not."""
    graph = build_graph(lambda *args: attend(*args, v=lambda v, row: v + row), ATTEND, CACHE, SCALAR, SCALAR)[0]
    assert graph.phase("wq+wk+wv").parts[2].writes == ("wv",)
    assert not any("wv.raw" in form.tensors for form in neighbours(graph))
    plain = build_graph(lambda *args: attend(*args, v=lambda v, row: v * 2), ATTEND, CACHE, SCALAR, SCALAR)[0]
    assert any("wv.raw" in form.tensors for form in neighbours(plain))


def test_a_norm_over_all_heads_before_attention_is_refused():
    """Regression: it was computed head by head."""
    with pytest.raises(
        UnsupportedError, match=r"reduce\[\] cannot be computed for attention's heads; apply it before the projection, or to"
    ):
        build_graph(lambda *args: attend(*args, q=mk.rms_norm), ATTEND, CACHE, SCALAR, SCALAR)


def weights(graph: OpGraph):
    return collections.Counter((p.segment, w) for p in graph.phases for part in p.parts for w in part.weights)


@settings(max_examples=15, deadline=None)
@given(random_decoders.forms())
def test_every_form_is_the_same_step(walk):
    """It verifies, its weights and outputs are the same, and its names tell it from all others."""
    first = walk[0]
    for graph in walk[1:]:
        verify_graph(graph)
        assert weights(graph) == weights(first)
        assert sorted(graph.output_of) == sorted(first.output_of)
        assert {t.name for t in graph.tensors.values() if t.carried} == {"x"}
        again = form_of(first, names(graph), list(graph.tensors))
        assert again.to_json() == graph.to_json() and again.form.order == graph.form.order


@settings(max_examples=10, deadline=None)
@given(random_decoders.forms())
def test_no_two_forms_have_the_same_names(walk):
    found = [walk[-1], *neighbours(walk[-1]), *orders(walk[-1])]
    assert len({(tuple(names(g)), tuple(sorted(g.tensors))) for g in found}) == len(found)
