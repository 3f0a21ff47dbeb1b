"""Slices of a projection, or of a weight: rows of one weight, which become parts and phases as weights of their own would."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mkdsl as mk
from mkdsl.graph import Leaf, OpGraph, Rows, build_graph

SCALAR = jax.ShapeDtypeStruct((), jnp.int32)


def leaf(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


ROWS = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "gate": (192, 128), "up": (192, 128)}
PARAMS = {
    "embed": leaf(192, 128),
    "bias": leaf(256),
    "head": leaf(4, 64),
    "numbers": leaf(8),
    "layers": {"qkv": leaf(2, 256, 128), "gu": leaf(2, 384, 128), "wo": leaf(2, 128, 128), "wd": leaf(2, 128, 192), "bias": leaf(2, 256)},
    "apart": {**{n: leaf(2, *shape) for n, shape in ROWS.items()}, "wo": leaf(2, 128, 128), "wd": leaf(2, 128, 192)},
    "qkv": leaf(256, 128),
    "odd": leaf(100, 128),
}
KV = {name: leaf(2, 1, 64, 64) for name in "kv"}


def graph_of(f) -> OpGraph:
    """Of a step that returns f(p, x, pos)."""
    return build_graph(lambda params, kv, token, pos: f(params, mk.embed(params["embed"], token), pos), PARAMS, KV, SCALAR, SCALAR)[0]


def ranges(graph: OpGraph, phase: str) -> list[list[Rows]]:
    """By part, the rows that are folded."""
    return [[graph.node(graph.node(f).inputs[0]).rows for f in folds] for folds, _ in graph.code[phase].parts]


def decoder(project) -> OpGraph:
    """Layers whose projections come from project(p, name of the fused weight, names of its parts, activation)."""

    def layer(x, p, kv, pos):
        q, k, v = project(p, "qkv", "qkv", x)
        kv = mk.append(kv, mk.heads(k, 1), mk.heads(v, 1), pos)
        x = x + mk.linear(p["wo"], mk.attention(mk.heads(q, 2), kv, pos))
        gate, up = project(p, "gu", ("gate", "up"), x)
        return x + mk.linear(p["wd"], jax.nn.silu(gate) * up), kv

    def step(params, kv, token, pos):
        stack = params["apart" if project is apart else "layers"]
        x, kv = mk.layers(layer, mk.embed(params["embed"], token), stack, kv, pos)
        return mk.linear(params["embed"], x), kv

    return build_graph(step, PARAMS, KV, SCALAR, SCALAR)[0]


def apart(p, fused, names, x):
    return [mk.linear(p[n], x) for n in names]


ENDS = {"qkv": [128, 192], "gu": [192]}
WAYS = {
    "split": lambda p, fused, names, x: jnp.split(mk.linear(p[fused], x), ENDS[fused]),
    "sliced": lambda p, fused, names, x: [mk.linear(p[fused], x)[a:b] for a, b in _ranges(fused)],
    "weight": lambda p, fused, names, x: [mk.linear(p[fused][a:b], x) for a, b in _ranges(fused)],
    "weight split": lambda p, fused, names, x: [mk.linear(w, x) for w in jnp.split(p[fused], ENDS[fused])],
    "heads": lambda p, fused, names, x: [a.reshape(-1) for a in jnp.split(mk.heads(mk.linear(p[fused], x), 4), [e // 64 for e in ENDS[fused]])]
    if fused == "qkv"
    else jnp.split(mk.linear(p[fused], x), 2),
    "sliced twice": lambda p, fused, names, x: [mk.linear(p[fused], x)[:b][a:] for a, b in _ranges(fused)],
}  # fmt: skip


def _ranges(fused: str) -> list[tuple[int, int]]:
    whole = {"qkv": 256, "gu": 384}[fused]
    return list(zip([0, *ENDS[fused]], [*ENDS[fused], whole], strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_phases_are_those_of_weights_apart(way):
    """But for names: as many, with the same parts, widths, readers."""
    fused, other = decoder(WAYS[way]), decoder(apart)
    assert [phase_but_names(p) for p in fused.phases] == [phase_but_names(p) for p in other.phases]
    assert len(fused.tensors) == len(other.tensors)
    qkv, gate_up = (p.name for p in fused.phases if "[" in p.name)
    assert ranges(fused, qkv) == [[Rows(0, 128, 256)], [Rows(128, 64, 256)], [Rows(192, 64, 256)]]
    assert ranges(fused, gate_up) == [[Rows(0, 192, 384), Rows(192, 192, 384)]]
    assert qkv == "qkv[0:128]+qkv[128:192]+qkv[192:256]"


def phase_but_names(phase):
    parts = tuple(dataclasses.replace(part, weights=len(part.weights), writes=len(part.writes)) for part in phase.parts)
    return dataclasses.replace(phase, name="", where="", reads=len(phase.reads), row_reads=len(phase.row_reads), parts=parts)


def silu(y):
    return jax.nn.silu(y)


PUSHED = {
    "elementwise": lambda p, x, pos: silu(mk.linear(p["qkv"], x))[64:128],
    "with a bias": lambda p, x, pos: mk.linear(p["qkv"], x, p["bias"])[64:128],
    "a weight and its bias": lambda p, x, pos: mk.linear(p["qkv"][64:128], x, p["bias"][64:128]),
    "a number": lambda p, x, pos: (mk.linear(p["qkv"], x) * pos)[64:128],
    "a constant": lambda p, x, pos: (mk.linear(p["qkv"], x) * jnp.arange(256))[64:128],
    "a statistic": lambda p, x, pos: (mk.linear(p["qkv"], mk.rms_norm(x)))[64:128],
    "heads": lambda p, x, pos: mk.heads(mk.linear(p["qkv"], x), 4)[1:2].reshape(-1),
    "one head": lambda p, x, pos: mk.heads(mk.linear(p["qkv"], x), 4)[1],
    "split heads": lambda p, x, pos: jnp.split(mk.linear(p["qkv"], x).reshape(4, 64), 4)[1].reshape(-1),
    "jitted": lambda p, x, pos: jax.jit(lambda y: y[64:128])(mk.linear(p["qkv"], x)),
    "slices of slices": lambda p, x, pos: mk.linear(p["qkv"][32:], x)[16:][16:80],
    "lax.slice": lambda p, x, pos: lax.slice(mk.linear(p["qkv"], x), (64,), (128,)),
    "a users fold": lambda p, x, pos: mk.fold(distance, p["qkv"], x)[64:128],
}


def distance(carry, tile, x):
    return carry + jnp.sum(jnp.abs(tile.astype(jnp.float32) - x), -1)


@pytest.mark.parametrize("name", PUSHED)
def test_a_slice_goes_down_to_the_weight(name):
    graph = graph_of(PUSHED[name])
    (phase,) = graph.phases
    assert ranges(graph, phase.name) == [[Rows(64, 64, 256)]]
    assert (phase.rows, phase.name) == (64, "qkv[64:128]")


def test_what_is_attended_may_be_normed_and_rotated_before_it_is_told_apart():
    def step(params, kv, token, pos):
        heads = mk.heads(mk.linear(params["qkv"], mk.embed(params["embed"], token)), 4)
        turned = mk.rope(mk.rms_norm(heads) * params["head"].astype(jnp.float32), pos)
        kv = mk.append(kv, turned[2:3], heads[3:], pos)
        return mk.linear(params["qkv"], mk.attention(turned[:2], kv, pos)), kv

    graph, _ = build_graph(step, PARAMS, {name: leaf(1, 64, 64) for name in "kv"}, SCALAR, SCALAR)
    first, attention, _ = graph.phases
    assert ranges(graph, first.name) == [[Rows(128, 64, 256)], [Rows(192, 64, 256)], [Rows(0, 128, 256)]]
    leaves = [n.op for n in map(graph.node, graph.dag) if n.kind == "param" and n.op.path.startswith("head")]
    assert [a.path for a in leaves if a.rows] == ["head[2:3]", "head[0:2]"]
    assert attention.kind == "attention"


@pytest.mark.parametrize(
    ("weight", "rows", "aligned"),
    [("qkv", slice(64, 128), 8), ("qkv", slice(4, 64), 4), ("qkv", slice(3, 64), 1), ("odd", slice(8, 16), 4)],
)
def test_alignment_is_that_of_beginning_and_whole(weight, rows, aligned):
    """Where rows end matters to nobody: what lies behind them does no harm."""
    (phase,) = graph_of(lambda p, x, pos: mk.linear(p[weight][rows], x)).phases
    assert phase.aligned == aligned
    assert phase.in_place(1) == (aligned == 8)


def test_the_whole_is_folded_only_for_those_who_use_it():
    both = graph_of(lambda p, x, pos: (lambda y: (y[:64], y))(mk.linear(p["qkv"], x)))
    assert [p.name for p in both.phases] == ["qkv+qkv[0:64]"]
    normed = graph_of(lambda p, x, pos: mk.rms_norm(mk.linear(p["qkv"], x))[:64])
    assert [p.name for p in normed.phases] == ["qkv+qkv[0:64]", "map"]
    unused = graph_of(lambda p, x, pos: jnp.split(mk.linear(p["qkv"], x), 4)[1])
    assert [p.name for p in unused.phases] == ["qkv[64:128]"]


def test_numbers_of_a_vector_of_params():
    """A slice of a leaf that is a number is known before the kernel starts."""
    graph = graph_of(lambda p, x, pos: mk.linear(p["qkv"], x) * p["numbers"][3])
    assert [n.op.rows for n in map(graph.node, graph.dag) if n.kind == "given" and isinstance(n.op, Leaf)] == [Rows(3, 1, 8)]


def test_a_leaf_has_its_rows():
    array = np.arange(24).reshape(2, 4, 3)
    one, stacked = (Leaf("w", 0, s, Rows(1, 2, 4)) for s in (False, True))
    np.testing.assert_array_equal(one.of([array[0]]), array[0, 1:3])
    np.testing.assert_array_equal(stacked.of([array]), array[:, 1:3])


@pytest.mark.parametrize("f", [lambda p, x, pos: mk.linear(p["qkv"], x)[5] * x, lambda p, x, pos: mk.linear(p["qkv"][5:6], x) * x])
def test_one_feature_that_meets_a_vector_is_a_number(f):
    """Regression: each row of the vector was multiplied with what lies behind the one row of the weight."""
    graph = graph_of(f)
    assert [len(graph.code[p.name].stats) for p in graph.phases] == [0, 1]
    assert graph.phases[0].name == "qkv[5:6]"


REFUSED = {
    "the residual stream": lambda p, x, pos: x[:64],
    "no rows": lambda p, x, pos: jnp.concatenate([mk.linear(p["qkv"], x)[:0], x]),
    "every other row": lambda p, x, pos: mk.linear(p["odd"], x)[::2],
    "features of heads": lambda p, x, pos: mk.heads(mk.linear(p["qkv"], x), 4)[:, :32].reshape(-1),
    "columns of a weight": lambda p, x, pos: mk.linear(p["layers"]["wd"][0][:, :128], x),
    "parts of heads": lambda p, x, pos: jnp.split(mk.linear(p["qkv"], x).reshape(2, 128), 2, axis=1)[0].reshape(-1),
    "rows of a stack": lambda p, x, pos: mk.layers(lambda x, w, kv: (x + mk.linear(w, x), kv), x, p["layers"]["qkv"][:, :128], ())[0],
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_slices_are_refused(name):
    with pytest.raises(
        mk.UnsupportedError, match=r"test_rows\.py:\d+.*has no tile lowering; a slice takes neighbouring rows of a projection"
    ):
        graph_of(REFUSED[name])


def test_layers_of_a_stack_are_no_rows():
    with pytest.raises(mk.UnsupportedError, match="the layers scan over a computed param; scan over params and kv as they came in"):
        graph_of(lambda p, x, pos: mk.layers(lambda x, b, kv: (x + mk.linear(p["qkv"], x, b)[:128], kv), x, p["layers"]["bias"][:1], ())[0])


def test_a_table_is_no_slice():
    with pytest.raises(
        mk.UnsupportedError, match=r"mk\.embed looks up rows of a leaf of params that is not stacked over layers, nor sliced"
    ):
        graph_of(lambda p, x, pos: mk.linear(p["qkv"], mk.embed(p["embed"][:64], pos)))
