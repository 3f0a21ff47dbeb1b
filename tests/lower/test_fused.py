"""Interpreted kernels of decoders whose projections are rows of one weight, against the float32 reference of the same decode step; and how many
bytes XLA copies for them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, arguments, check

import mkdsl as mk
from mkdsl.gpu import Traced, assemble
from mkdsl.graph import Leaf, Node, Rows
from mkdsl.lower._operands import Inputs, operands
from mkdsl.lower._tile import Tile
from mkdsl.models import SHAPES, abstract_params, decode_step, init_cache
from mkdsl.schedule import PROFILES, Schedule

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
def fused(
    layers: int = 2, hidden: int = 192, heads: int = 3, kv_heads: int = 1, head_dim: int = 64, inner: int = 192, cut: int = 0
) -> tiny.Decoder:
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
    "in whole blocks": ({"hidden": 64, "heads": 1, "inner": 64, "cut": 128}, 1),
    "groups of three heads": ({}, 1),
    "a padded batch": ({"layers": 1, "heads": 2, "kv_heads": 2}, 3),
    "rows that begin anywhere, in place": ({"hidden": 128, "heads": 2, "inner": 99, "cut": 61}, 1),
    "rows that begin anywhere": ({"layers": 1, "heads": 2, "head_dim": 80, "inner": 99, "cut": 61}, 1),
    "weights that are copied": ({"layers": 2, "hidden": 100, "inner": 60, "cut": 3}, 2),
}


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] if name != "in whole blocks" else []) for name in CASES])
def test_fused_decoders(case):
    sizes, batch = CASES[case]
    decoder = fused(**sizes)
    args = arguments(decoder, batch)
    check(decoder, args, mk.jit(decoder.step, batch=batch, target=SMALL, interpret=True)(*args))


FOLDS = {
    "a fold of ones own": lambda p, x: jnp.split(mk.fold(distance, p["w"], x), [24, 40])[1],
    "the last rows": lambda p, x: mk.linear(p["w"], x)[-5:],
    "a number for all": lambda p, x: mk.linear(p["w"], x)[:32] * jax.nn.sigmoid(mk.linear(p["one"], x, p["bias"])),
    "one row for all": lambda p, x: (lambda y: y[1:] * y[0])(mk.linear(p["w"], x)),
}


def distance(carry, tile, x):
    return carry + 0.1 * jnp.sum(jnp.abs(tile.astype(jnp.float32) - x), -1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FOLDS)
def test_folds_of_rows(name):
    """Regression, of a number for all: a projection to one feature had as many as it met."""
    params = tiny.drawn({"embed": (64, 128), "w": (72, 128), "one": (1, 128), "bias": (1,)}, 6)

    def step(params, kv, token, pos):
        y = FOLDS[name](params, mk.embed(params["embed"], token))
        return mk.argmax(y), y, kv

    args = params, (), np.arange(2), np.zeros(2, int)
    got = mk.jit(step, batch=2, target=SMALL, interpret=True)(*args)
    np.testing.assert_allclose(got[1], jax.vmap(step, (None, None, 0, 0), (0, 0, None))(*args)[1], atol=2e-2)


# The shapes of Llama-3.2-1B: a schedule, a kernel.


def of_shape(step: Any, params: Any, target: str) -> Traced:
    kv = jax.eval_shape(lambda: init_cache(CONFIG, 512, batch=1))
    integers = jax.ShapeDtypeStruct((1,), jnp.int32)
    return mk.jit(step, batch=1, target=target).trace(params, kv, integers, integers)


CONFIG = SHAPES["llama-3.2-1b"]


def llama(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
    """`decode_step`, with q, k and v in one weight, gate and up in another."""
    q, k = CONFIG.heads * CONFIG.head_dim, CONFIG.kv_heads * CONFIG.head_dim

    def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array) -> Any:
        queries, keys, values = jnp.split(mk.linear(p["wqkv"], mk.rms_norm(x, p["input_norm"], eps=CONFIG.eps)), [q, q + k])
        rotated = [mk.rope(mk.heads(a, n), pos, theta=CONFIG.theta) for a, n in ((queries, CONFIG.heads), (keys, CONFIG.kv_heads))]
        kv = mk.append(kv, rotated[1], mk.heads(values, CONFIG.kv_heads), pos)
        x = x + mk.linear(p["wo"], mk.attention(rotated[0], kv, pos))
        gate, up = jnp.split(mk.linear(p["w_gate_up"], mk.rms_norm(x, p["post_norm"], eps=CONFIG.eps)), 2)
        return x + mk.linear(p["wd"], jax.nn.silu(gate) * up), kv

    x, kv = mk.layers(layer, mk.embed(params["embed"], token), params["layers"], kv, pos)
    logits = mk.linear(params["embed"], mk.rms_norm(x, params["norm"], eps=CONFIG.eps))
    return mk.argmax(logits), logits, kv


def llama_params() -> Any:
    params = abstract_params(CONFIG)
    layers = dict(params["layers"])
    for name, of in (("wqkv", ("wq", "wk", "wv")), ("w_gate_up", ("wg", "wu"))):
        parts = [layers.pop(n) for n in of]
        layers[name] = jax.ShapeDtypeStruct((parts[0].shape[0], sum(a.shape[1] for a in parts), parts[0].shape[2]), parts[0].dtype)
    return params | {"layers": layers}


def plans(schedule: Schedule) -> list[Any]:
    """Without what depends on names."""
    return [dataclasses.replace(plan, name="", waits=()) for plan in schedule.phases]


def test_the_schedule_is_that_of_weights_apart():
    """And no weight is copied for it: a kernel is handed each of them as it is, but for a reshape."""
    fused, apart = of_shape(llama, llama_params(), "h200"), of_shape(decode_step(CONFIG), abstract_params(CONFIG), "h200")
    found = fused.schedule()
    assert plans(found) == plans(apart.schedule())
    assert found.predicted_us == apart.schedule().predicted_us
    leaves = jax.tree.leaves(llama_params())
    streamed = [o for o in operands(fused.graph, found) if o.name.startswith("weight")]
    made = [jax.make_jaxpr(lambda *p, o=o: o.build(Inputs(p, (), o, o)))(*leaves) for o in streamed]
    assert len(made) == 8
    assert {eqn.primitive.name for jaxpr in made for eqn in jaxpr.eqns} == {"reshape"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["h200", "l20"])
def test_the_kernel_assembles(target):
    lowered = of_shape(llama, llama_params(), target).lower()
    (kernel,) = assemble(lowered.program, *lowered.signature, capability=PROFILES[target].capability)
    assert kernel.spill_bytes == 0


@pytest.mark.parametrize(
    ("rows", "split_k", "handed"),
    [
        (Rows(64, 64, 256), 1, Rows(64, 64, 256)),
        (Rows(99, 99, 198), 8, Rows(99, 99, 198)),
        (Rows(99, 99, 198), 4, Rows(0, 99, 100)),
        (Rows(4, 10, 20), 2, Rows(4, 10, 20)),
        (Rows(4, 10, 20), 1, Rows(0, 10, 16)),
        (Rows(0, 20, 20), 1, Rows(0, 20, 24)),
    ],
)
def test_where_rows_lie(rows, split_k, handed):
    """In the array itself if they begin, and a layer ends, with a whole block; else in a copy of them alone."""
    weight = Node(0, "param", (rows.count, 512), "bfloat16", op=Leaf("w", 0, True, rows))
    tile = Tile(64 // split_k, split_k, 64, 1, 512, 1)
    assert tile.handed(weight) == handed
