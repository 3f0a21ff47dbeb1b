"""What a refusal advises works: the program with the remedy is taken, and computes what the refused one says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mkdsl as mk
from mkdsl.graph import build_graph

H = 128
RNG = np.random.default_rng(1)


def whole(*shape):
    """Small whole numbers, which bfloat16 and float32 sums hold."""
    return jnp.asarray(RNG.integers(-3, 4, shape), jnp.bfloat16)


W, TABLE, STACKED = whole(H, H), whole(H, H), whole(3, H, H)
PARAMS = {
    "table": TABLE,
    "w": W,
    "wT": W.T,
    "w_reversed": W[::-1],
    "even": jnp.eye(H, dtype=jnp.bfloat16)[::2],
    "identity": jnp.eye(H, dtype=jnp.bfloat16),
    "twice": jnp.concatenate([W, W]),
    "stacked": STACKED,
    "ones": jnp.tril(jnp.ones((H, H), jnp.bfloat16)),
    "before": jnp.where(jnp.tril(jnp.ones((H, H), bool)), 0, -jnp.inf).astype(jnp.bfloat16),
    "noise": jax.random.normal(jax.random.key(3), (H,)),
}


def running_max(carry, tile, x):
    return jnp.maximum(carry, jnp.max(tile.astype(jnp.float32) + x, -1))


REMEDIES = {
    "dot_general": (lambda x, p: p["w"].astype(jnp.float32) @ x, lambda x, p: mk.linear(p["w"], x)),
    "transpose": (lambda x, p: mk.linear(p["w"].T, x), lambda x, p: mk.linear(p["wT"], x)),
    "slice": (lambda x, p: x[32:96], lambda x, p: mk.linear(p["identity"][32:96], x)),
    "slice of every other": (lambda x, p: mk.linear(p["w"], x)[::2], lambda x, p: mk.linear(p["even"], mk.linear(p["w"], x))),
    "split": (lambda x, p: jnp.split(x, 2)[1], lambda x, p: mk.linear(p["identity"][64:], x)),
    "concatenate": (lambda x, p: jnp.concatenate([mk.linear(p["w"], x)] * 2), lambda x, p: mk.linear(p["twice"], x)),
    "dynamic_slice": (
        lambda x, p: mk.linear(p["stacked"][2], mk.linear(p["stacked"][1], mk.linear(p["stacked"][0], x))),
        lambda x, p: mk.layers(lambda x, w, kv: (mk.linear(w, x), kv), x, p["stacked"], ())[0],
    ),
    "gather": (lambda x, p: x + jnp.take(p["table"], 5, axis=0), lambda x, p: x + mk.embed(p["table"], 5)),
    "cond": (lambda x, p: lax.cond(x.sum() > 1, jnp.sin, jnp.cos, x), lambda x, p: jnp.where(x.sum() > 1, jnp.sin(x), jnp.cos(x))),
    "stack": (lambda x, p: jnp.select([x > 1, x > 0], [x, 2 * x], 0.0), lambda x, p: jnp.where(x > 1, x, jnp.where(x > 0, 2 * x, 0.0))),
    "cumsum": (lambda x, p: jnp.cumsum(x), lambda x, p: mk.linear(p["ones"], x)),
    "cummax": (lambda x, p: lax.cummax(x), lambda x, p: mk.fold(running_max, p["before"], x, init=-jnp.inf, merge=jnp.maximum)),
    "rev": (lambda x, p: mk.linear(p["w"], x)[::-1], lambda x, p: mk.linear(p["w_reversed"], x)),
    "sort": (lambda x, p: jnp.sort(mk.linear(p["w"], x)), lambda x, p: mk.linear(p["w"], x), jnp.sort),
    "top_k": (lambda x, p: lax.top_k(mk.linear(p["w"], x), 4)[1], lambda x, p: mk.linear(p["w"], x), lambda y: lax.top_k(y, 4)[1]),
    "argmax": (lambda x, p: jnp.argmax(mk.linear(p["w"], x)), lambda x, p: mk.argmax(mk.linear(p["w"], x))),
    "argmin": (lambda x, p: jnp.argmin(mk.linear(p["w"], x)), lambda x, p: mk.argmax(-mk.linear(p["w"], x))),
    "random_bits": (
        lambda x, p: x + jax.random.normal(jax.random.key(3), (H,)),
        lambda x, p: x + p["noise"],
    ),
    "reduce_sum of int32": (lambda x, p: x * (x > 0).sum(), lambda x, p: x * (x > 0).astype(jnp.float32).sum()),
    "reduce_sum(float32[2, 64])": (lambda x, p: x + x.reshape(2, 64).sum(0).sum(), lambda x, p: x + x.sum()),
}


def build(f):
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return build_graph(lambda params, kv, token, pos: f(mk.embed(params["table"], token), params), PARAMS, (), scalar, scalar)


@pytest.mark.parametrize("name", REMEDIES)
def test_the_remedy_computes_the_same(name):
    refused, remedy, *outside = REMEDIES[name]
    with pytest.raises(mk.UnsupportedError):
        build(refused)
    build(remedy)
    x = mk.embed(TABLE, 7)
    got = remedy(x, PARAMS)
    np.testing.assert_array_equal(outside[0](got) if outside else got, refused(x, PARAMS))
