"""Interpreted kernels of decoders whose projections are rows of one weight, against the float32 reference of the same decode step; and how many
bytes XLA copies for them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, arguments, check, check_schedule, traced, with_tiles

import mkdsl as mk
from mkdsl.gpu import Traced
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]


def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array, *, heads: int, kv_heads: int) -> Any:
    """q, k, v with biases of which each has its rows; gate and up of another weight."""
    h = mk.rms_norm(x, p["norm_a"])
    y = mk.linear(p["wqkv"], h, p["bias"])
    d = y.size // (heads + 2 * kv_heads)
    q, k, v = y[: heads * d], y[heads * d : -kv_heads * d], y[-kv_heads * d :]
    kv = mk.append(kv, mk.rope(mk.heads(k, kv_heads), pos), mk.heads(v, kv_heads), pos)
    x = x + mk.linear(p["wo"], mk.attention(mk.rope(mk.heads(q, heads), pos), kv, pos))
    gate, up = jnp.split(mk.linear(p["w_gate_up"], mk.rms_norm(x, p["norm_b"])), 2)
    return x + mk.linear(p["wd"], jax.nn.silu(gate) * up), kv


@functools.cache
def fused(layers: int = 2, hidden: int = 192, heads: int = 3, kv_heads: int = 1, head_dim: int = 64, inner: int = 192, cut: int = 0) -> tiny.Decoder:
    """cut: the logits leave out so many rows of the embedding."""

    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        body = functools.partial(layer, heads=heads, kv_heads=kv_heads)
        x, kv = mk.layers(lambda *args: body(*args), mk.embed(params["embed"], token), params["layers"], kv, pos)
        logits = mk.linear(params["embed"][cut:], mk.rms_norm(x))
        return mk.argmax(logits), logits, kv

    q, k = heads * head_dim, kv_heads * head_dim
    shapes = {"wqkv": (q + 2 * k, hidden), "bias": (q + 2 * k,), "wo": (hidden, q), "w_gate_up": (2 * inner, hidden), "wd": (hidden, inner)}
    shapes |= {"norm_a": (hidden,), "norm_b": (hidden,)}
    drawn = tiny.drawn({name: (layers, *shape) for name, shape in shapes.items()}, 1)
    return tiny.Decoder(step, tiny.drawn({"embed": (192, hidden)}, 2) | {"layers": drawn}, (layers, kv_heads, head_dim))


CASES = {
    "in whole blocks": ({}, 1),
    "a padded batch": ({"layers": 1, "heads": 2, "kv_heads": 2}, 3),
    "rows that begin anywhere": ({"layers": 1, "heads": 2, "head_dim": 80, "inner": 99, "cut": 61}, 1),
    "weights that are copied": ({"layers": 2, "hidden": 100, "inner": 60, "cut": 3}, 2),
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] if name != "in whole blocks" else []) for name in CASES])
def test_fused_decoders(case):
    sizes, batch = CASES[case]
    decoder = fused(**sizes)
    args = arguments(decoder, batch)
    check(decoder, args, mk.jit(decoder.step, batch=batch, target=SMALL, interpret=True)(*args))


@pytest.mark.slow
@pytest.mark.parametrize("split_k", [1, 2, 4, 8])
def test_tiles_of_rows_that_begin_in_the_middle_of_a_block(split_k):
    """At row 99 of 198, and 61 of 192: only 8 pieces of each row make whole blocks of them. Other tiles take a copy."""
    decoder = fused(layers=1, hidden=128, inner=99, cut=61)
    found = traced(decoder, args := arguments(decoder, 1))
    gate_up, head = (p.name for p in found.graph.phases if "gate" in p.name and p.kind == "fold" and "·" in p.name), "embed[61:192]"
    check_schedule(decoder, args, with_tiles(found.graph, 1, **{name: {"split_k": split_k} for name in (*gate_up, head)}), found)


FOLDS = {
    "a fold of ones own": lambda p, x: jnp.split(mk.fold(distance, p["w"], x), [24, 40])[1],
    "the last rows": lambda p, x: mk.linear(p["w"], x)[-5:],
    "a number for all": lambda p, x: mk.linear(p["w"], x)[:32] * jax.nn.sigmoid(mk.linear(p["one"], x, p["bias"])),
    "one row for all": lambda p, x: (lambda y: y[1:] * y[0])(mk.linear(p["w"], x)),
}


def distance(carry, tile, x):
    return carry + 0.1 * jnp.sum(jnp.abs(tile.astype(jnp.float32) - x), -1)


@pytest.mark.parametrize("name", [n if n == "a number for all" else pytest.param(n, marks=pytest.mark.slow) for n in FOLDS])
def test_folds_of_rows(name):
    """Regression, of a number for all: a projection to one feature had as many as it met."""
    params = tiny.drawn({"embed": (64, 128), "w": (72, 128), "one": (1, 128), "bias": (1,)}, 6)

    def step(params, kv, token, pos):
        y = FOLDS[name](params, mk.embed(params["embed"], token))
        return mk.argmax(y), y, kv

    args = params, (), np.arange(2), np.zeros(2, int)
    got = mk.jit(step, batch=2, target=SMALL, interpret=True)(*args)
    np.testing.assert_allclose(got[1], jax.vmap(step, (None, None, 0, 0), (0, 0, None))(*args)[1], atol=2e-2)


# The shapes of Llama-3.2-1B.


def of_shape(step: Any, params: Any, target: str) -> Traced:
    config = SHAPES["llama-3.2-1b"]
    kv = jax.eval_shape(lambda: init_cache(config, 512, batch=1))
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    return mk.jit(step, batch=1, target=target).trace(params, kv, integers, integers)
