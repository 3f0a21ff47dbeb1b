"""What a kernel does in place, or to whole heads, a decode step may not ask for in another way: regressions of what the grammar found."""

import jax
import jax.numpy as jnp
import pytest

import mkdsl as mk
from mkdsl.graph import OpGraph, UnsupportedError, build_graph


def leaf(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


PARAMS = {
    "embed": leaf(64, 64),
    "wq": leaf(128, 64),
    "wk": leaf(64, 64),
    "wv": leaf(64, 64),
    "wo": leaf(64, 128),
    "stack": leaf(1, 1, 64, 64),
}


def graph_of(step, **more: jax.ShapeDtypeStruct) -> OpGraph:
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return build_graph(
        step, PARAMS | more, {"a": (leaf(1, 64, 64),) * 2, "b": (leaf(1, 64, 64),) * 2, "long": (leaf(1, 128, 64),) * 2}, scalar, scalar
    )[0]


def project(params, x):
    return [mk.heads(mk.linear(params[name], x), n) for name, n in (("wq", 2), ("wk", 1), ("wv", 1))]


def twice(params, kv, token, pos):
    q, k, v = project(params, mk.embed(params["embed"], token))
    first = mk.append(kv["a"], k, v, pos - 1)
    q, k, v = project(params, mk.linear(params["wo"], mk.attention(q, first, pos - 1)))
    return mk.linear(params["wo"], mk.attention(q, mk.append(kv["a"], k, v, pos), pos)), first


def test_a_cache_that_is_appended_to_twice():
    """Regression: the second attention saw what the first one had written."""
    with pytest.raises(
        UnsupportedError, match=r"\(twice\): the cache a.0 is appended to a second time, after .*append once and attend as often"
    ):
        graph_of(twice)


def apart(params, kv, token, pos, at=lambda pos: pos - 1):
    """Two caches, of whose keys and values each attention takes one's."""
    q, k, v = project(params, mk.embed(params["embed"], token))
    a, b = mk.append(kv["a"], k, v, pos), mk.append(kv["b"], k, v, at(pos))
    y = mk.attention(q, (a[0], b[1]), pos) + mk.attention(q, (b[0], a[1]), pos)
    return mk.linear(params["wo"], y), a, b


def test_keys_and_values_at_different_positions():
    """Regression: values were appended where the keys were."""
    with pytest.raises(UnsupportedError, match=r"\(apart\): keys and values were appended at different positions; attend over what one"):
        graph_of(apart)
    assert [p.kind for p in graph_of(lambda *args: apart(*args, at=lambda pos: pos)).phases].count("attention") == 2


def at_the_beginning(params, kv, token, pos):
    q, k, v = project(params, mk.embed(params["embed"], token))
    kv = mk.append(kv["a"], k, v, 0)
    return mk.linear(params["wo"], mk.attention(q, kv, 0)), kv


def test_a_position_may_be_a_constant():
    assert [p.kind for p in graph_of(at_the_beginning).phases] == ["fold", "attention", "fold"]


@pytest.mark.parametrize("heads", [1, 4])
def test_a_rotation_of_other_heads_than_attentions(heads):
    """Regression: the halves of attention's heads were rotated."""

    def step(params, kv, token, pos):
        q, k, v = project(params, mk.embed(params["embed"], token))
        kv = mk.append(kv["a"], k, v, pos)
        return mk.linear(params["wo"], mk.attention(mk.rope(q.reshape(heads, -1), pos).reshape(q.shape), kv, pos)), kv

    with pytest.raises(UnsupportedError, match=rf"rope\[{heads}, {128 // heads}\] cannot be computed for attention's heads"):
        graph_of(step)


def test_a_scan_in_a_scan_of_one_layer():
    """Regression: the inner one ended the outer one's segment, and what came after it was computed once for all."""

    def step(params, kv, token, pos):
        inner = lambda x, w, kv: (x + mk.linear(w, x), kv)  # noqa: E731
        outer = lambda x, w, kv: (mk.layers(inner, jnp.tanh(x), w, ())[0], kv)  # noqa: E731
        return mk.layers(outer, mk.embed(params["embed"], token), params["stack"], ())[0]

    with pytest.raises(UnsupportedError, match="a scan inside a scan"):
        graph_of(step)


def test_no_layers():
    """Regression: the search found that workers wait for ever."""

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        return mk.layers(lambda x, w, kv: (x + mk.linear(w, x), kv), x, params["none"], ())[0]

    with pytest.raises(UnsupportedError, match="a scan of no steps; leave it out"):
        graph_of(step, none=leaf(0, 64, 64))


def rotated(params, kv, token, pos, up_to=(lambda pos: pos, lambda pos: pos)):
    """Two attentions, over caches of 64 and 128 positions."""
    x, out = mk.embed(params["embed"], token), []
    for cache, at in zip((kv["a"], kv["long"]), up_to, strict=True):
        q, k, v = project(params, x)
        cache = mk.append(cache, mk.rope(k, pos), v, pos)
        out += [mk.linear(params["wo"], mk.attention(mk.rope(q, pos), cache, at(pos))), cache]
    return tuple(out)


@pytest.mark.parametrize(
    ("up_to", "limit", "table"),
    [
        ((lambda pos: pos, lambda pos: pos), 64, 128),
        ((lambda pos: pos, lambda pos: jnp.minimum(pos, 9)), 64, 0),
        ((lambda pos: jnp.minimum(pos, 9), lambda pos: 5), 0, 0),
    ],
)
def test_what_a_position_past_a_cache_leaves_intact(up_to, limit, table):
    """Regression: a table of rotations ended where the first of the caches did, or where something was appended past its end, and a traced position
    past that was rotated as the last."""
    graph = graph_of(lambda *args: rotated(*args, up_to=up_to))
    assert (graph.position_limit, graph.table_length) == (limit, table)
