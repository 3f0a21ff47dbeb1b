"""Random decode steps: attention and MLP after each other or side by side, with the norms, gates and biases that people use."""

import jax
import jax.numpy as jnp
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.graph import OpGraph, build_graph

NORMS = {
    "rms": lambda x, p: mk.rms_norm(x, p["norm"]),
    "layer": lambda x, p: mk.layer_norm(x, p["norm"], p["shift"]),
    "bare": lambda x, p: mk.layer_norm(x),
    "none": lambda x, p: x,
}
ACTIVATIONS = {"silu": jax.nn.silu, "square": jnp.square, "none": lambda x: x}
VECTORS = {"norm": (128,), "shift": (128,), "bias": (128,)}
LAYER = VECTORS | {
    "wq": (128, 128),
    "wk": (64, 128),
    "wv": (64, 128),
    "wo": (128, 128),
    "wg": (192, 128),
    "wu": (192, 128),
    "wd": (128, 192),
}


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16)


@st.composite
def steps(draw):
    """A decode step."""
    norm, act = NORMS[draw(st.sampled_from([*NORMS]))], ACTIVATIONS[draw(st.sampled_from([*ACTIVATIONS]))]
    after = NORMS[draw(st.sampled_from(["none", "rms", "layer"]))]
    aside, gated, biased, capped = (draw(st.booleans()) for _ in range(4))

    def layer(x, p, kv, pos):
        h = norm(x, p)
        q, k, v = (mk.heads(mk.linear(p[w], h), n) for w, n in (("wq", 2), ("wk", 1), ("wv", 1)))
        kv = mk.append(kv, mk.rope(k, pos), v, pos)
        a = after(mk.linear(p["wo"], mk.attention(q, kv, pos)), p)
        a = a + p["bias"] if biased else a
        h, x = (h, x) if aside else (norm(x + a, p), x + a)
        u = act(mk.linear(p["wg"], h)) * (mk.linear(p["wu"], h) if gated else 1.0)
        return x + after(mk.linear(p["wd"], u), p) + (a if aside else 0.0), kv

    def step(params, kv, token, pos):
        x, kv = mk.layers(layer, mk.embed(params["embed"], token), params["layers"], kv, pos)
        logits = mk.linear(params["embed"], norm(x, params))
        return mk.argmax(logits), 30 * jnp.tanh(logits) if capped else logits, kv

    return step


def traced(step, layers: int = 3) -> OpGraph:
    params = {"embed": leaf(64, 128), "layers": {n: leaf(layers, *s) for n, s in LAYER.items()}} | {n: leaf(*s) for n, s in VECTORS.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    return build_graph(step, params, (leaf(layers, 1, 64, 64),) * 2, scalar, scalar)[0]
