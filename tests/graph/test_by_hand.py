"""Rotary embedding that is written by hand is found to be one, and what only looks like it is refused."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from by_hand import FORMS, angles, rotate_half

import mkdsl as mk
from mkdsl.graph import OpGraph, UnsupportedError, build_graph, given_value
from mkdsl.ops import Rope


def leaf(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, dtype)


def build(turn) -> OpGraph:
    def step(params, kv, token, pos):
        x = mk.embed(params["table"], token)
        q, k, v = (mk.heads(mk.linear(params["wq"], x), 2) for _ in "qkv")
        kv = mk.append(kv, mk.rope(k, pos), v, pos)
        return mk.linear(params["wo"], mk.attention(turn(q, pos), kv, pos)), kv

    params = {"table": leaf(192, 128), "wq": leaf(128, 128), "wo": leaf(192, 128)}
    return build_graph(step, params, {n: leaf(2, 64, 64) for n in "kv"}, leaf(dtype="int32"), leaf(dtype="int32"))[0]


@pytest.mark.parametrize("name", FORMS)
def test_what_is_a_rotation(name):
    turn, dims, interleaved = FORMS[name]
    graph = build(turn)
    rope = next(n for n in map(graph.node, graph.dag) if n.kind == "rope" and n.op.theta != 1e4)
    assert (rope.op.dims, rope.op.interleaved) == (dims, interleaved)
    table = given_value(graph, rope.inputs[1], (None,) * 3 + graph.constants, jnp.int32(0), jnp.int32(37))
    x = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    expected = mk.rope(x, 37, dims=dims, interleaved=interleaved)
    np.testing.assert_allclose(x * table[0] + rope.op.partners(x) * table[1], expected, atol=1e-5)
    np.testing.assert_allclose(turn(x, 37), expected, atol=1e-5)  # else the test's form is wrong


def test_a_vector_of_numbers_that_are_known_scales_heads():
    graph = build(lambda q, pos: q * jnp.cos(jnp.arange(64) * pos))
    assert [n.op.dims for n in map(graph.node, graph.dag) if n.kind == "rope" and n.op.theta != 1e4] == [2]


def test_a_number_of_each_head_is_no_rotation():
    graph = build(lambda q, pos: q * (q.sum(1, keepdims=True) * jnp.cos(jnp.zeros((2, 1)) + pos)))
    assert not any(n.kind == "rope" and n.op.theta != 1e4 for n in map(graph.node, graph.dag))


COS = lambda pos: jnp.cos(jnp.tile(angles(pos), 2))  # noqa: E731
REFUSED = {
    "other pairs": (
        lambda q, pos: q * COS(pos) + q[:, ::-1] * COS(pos),
        "rev(float32[2, 64]) -> [2, 64] has no tile lowering; no reordering",
    ),
    "three features": (lambda q, pos: q * COS(pos) + rotate_half(q) + jnp.roll(q, 1, -1), "slice(float32[2, 64]) -> [2, 32]"),
    "heads exchanged": (lambda q, pos: q * COS(pos) + q[::-1] * COS(pos), "rev(float32[2, 64])"),
    "a cosine of each head": (lambda q, pos: q[:, ::-1] * jnp.cos(pos * jnp.arange(2.0)[:, None] + jnp.arange(64)), "rev(float32[2, 64])"),
    "multiplied with itself": (lambda q, pos: q * q[:, :32].sum(), "slice(float32[2, 64]) -> [2, 32]"),
    "a transcendental function": (lambda q, pos: q * COS(pos) + jnp.tanh(q[:, ::-1]), "rev(float32[2, 64])"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_none_is_refused_with_its_first_equation(name):
    turn, message = REFUSED[name]
    with pytest.raises(UnsupportedError, match=rf"by_hand\.py:\d+.*{re.escape(message)}"):
        build(turn)


@pytest.mark.parametrize("turn", [lambda q, pos: rotate_half(q), lambda q, pos: jnp.concatenate([q[:, :32], 2 * q[:, :32]], 1)])
def test_features_may_be_moved_within_pairs_by_constants(turn):
    graph = build(lambda q, pos: jnp.tanh(turn(q, pos)))
    rope = next(n for n in map(graph.node, graph.dag) if n.kind == "rope" and n.op.theta != 1e4)
    table = given_value(graph, rope.inputs[1], (None,) * 3 + graph.constants, jnp.int32(0), jnp.int32(37))
    x = np.random.default_rng(0).standard_normal((2, 64), np.float32)
    np.testing.assert_allclose(x * table[0] + rope.op.partners(x) * table[1], turn(x, 37), atol=1e-5)


def test_two_rotations_one_after_the_other():
    """The second is of what the first made."""
    (turn, *_), (other, *_) = FORMS["rotate_half"], FORMS["cohere"]
    graph = build(lambda q, pos: other(jnp.tanh(turn(q, pos)), pos // 2))
    assert [(n.op.dims, n.op.interleaved) for n in map(graph.node, graph.dag) if n.kind == "rope" and n.op.theta != 1e4] == [
        (64, False),
        (64, True),
    ]
    assert all(isinstance(n.op, Rope) for n in map(graph.node, graph.dag) if n.kind == "rope")
