"""What only wraps a function is transparent around anything: operators, layers, the step of a fold, the whole decode step."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

import mkdsl as mk
from mkdsl.graph import OpGraph, build_graph

PARAMS = {"embed": (192, 128), "wi": (64, 128)}
LAYER = {"wq": (2, 128, 128), "wk": (2, 64, 128), "wv": (2, 64, 128), "wo": (2, 128, 128), "norm": (2, 128)}


def custom_jvp(f):
    @jax.custom_jvp
    def wrapped(*args):
        return f(*args)

    wrapped.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
    return wrapped


def custom_vjp(f):
    @jax.custom_vjp
    def wrapped(*args):
        return f(*args)

    wrapped.defvjp(lambda *args: (f(*args), None), lambda _, g: g)
    return wrapped


def named_result(f):
    return lambda *args: jax.tree.map(lambda a: checkpoint_name(a, "saved"), f(*args))


def nothing(f):
    return f


WRAPS = {
    "jit": jax.jit,
    "jit, inline": functools.partial(jax.jit, inline=True),
    "checkpoint": jax.checkpoint,
    "checkpoint, policy": functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.nothing_saveable),
    "checkpoint_name": named_result,
    "named_call": functools.partial(jax.named_call, name="f"),
    "custom_jvp": custom_jvp,
    "custom_vjp": custom_vjp,
    "tile": mk.tile,
    "two": lambda f: jax.checkpoint(jax.jit(custom_vjp(f))),
}


def graph_of(wrap) -> OpGraph:
    distance = wrap(lambda carry, tile, x: carry + wrap(lambda t: jnp.sum(jnp.abs(t), -1))(tile.astype(jnp.float32) - x))
    linear = wrap(mk.linear)

    def layer(x, p, kv, pos):
        h = wrap(mk.rms_norm)(x, p["norm"])
        q, k, v = (wrap(lambda y, n=n: mk.heads(y, n))(linear(p[w], h)) for w, n in (("wq", 2), ("wk", 1), ("wv", 1)))
        kv = wrap(mk.append)(kv, wrap(mk.rope)(k, pos), v, pos)
        return x + linear(p["wo"], wrap(mk.attention)(mk.rope(q, wrap(lambda p: p // 2)(pos)), kv, pos)), kv

    def step(params, kv, token, pos):
        x, kv = mk.layers(wrap(layer), wrap(mk.embed)(params["embed"], token), params["layers"], kv, pos)
        y = mk.fold(distance, params["wi"], x, finish=wrap(jnp.sqrt))
        logits = wrap(lambda x: jax.nn.softmax(linear(params["embed"], x)))(x)
        return wrap(mk.argmax)(logits), y, kv

    def leaves(shapes):
        return {name: jax.ShapeDtypeStruct(shape, jnp.bfloat16) for name, shape in shapes.items()}

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    cache = leaves(dict.fromkeys("kv", (2, 1, 64, 64)))
    return build_graph(wrap(step), leaves(PARAMS) | {"layers": leaves(LAYER)}, cache, scalar, scalar)[0]


@pytest.fixture(scope="module")
def bare():
    return graph_of(nothing)


@pytest.mark.parametrize("name", WRAPS)
def test_calls_are_transparent(name, bare):
    """Regression: what jax.checkpoint wraps was refused; checkpoint_name was no elementwise function."""
    assert graph_of(WRAPS[name]).to_json() == bare.to_json()
