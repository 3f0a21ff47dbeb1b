"""A decoder layer from scratch, compiled to one kernel and run on the CPU under Pallas's interpreter and race detector.

The same function is the specification: jitted in float32 it gives the logits that the kernel's are compared with.
"""

import dataclasses

import jax
import jax.numpy as jnp

import mkdsl as mk
from mkdsl.schedule import PROFILES

LAYERS, HIDDEN, INNER, VOCAB = 2, 128, 256, 256
HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 4, 2, 64, 64


@mk.tile
def swiglu(gate, up):
    return gate * jax.nn.sigmoid(gate) * up


def decoder_layer(x, p, kv, pos):  # x: [hidden], one token of one sequence
    h = mk.rms_norm(x, p["input_norm"])
    q = mk.rope(mk.heads(mk.linear(p["wq"], h), HEADS), pos)
    k = mk.rope(mk.heads(mk.linear(p["wk"], h), KV_HEADS), pos)
    v = mk.heads(mk.linear(p["wv"], h), KV_HEADS)
    kv = mk.append(kv, k, v, pos)
    x = x + mk.linear(p["wo"], mk.attention(q, kv, pos))
    h = mk.rms_norm(x, p["post_norm"])
    return x + mk.linear(p["wd"], swiglu(mk.linear(p["wg"], h), mk.linear(p["wu"], h))), kv


def decode_step(params, kv, token, pos):
    x = mk.embed(params["embed"], token)
    x, kv = mk.layers(decoder_layer, x, params["layers"], kv, pos)
    logits = mk.linear(params["embed"], mk.rms_norm(x, params["norm"]))
    return mk.argmax(logits), logits, kv


def random_params(key):
    q, kv = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"wq": (q, HIDDEN), "wk": (kv, HIDDEN), "wv": (kv, HIDDEN), "wo": (HIDDEN, q)}
    shapes |= {"wg": (INNER, HIDDEN), "wu": (INNER, HIDDEN), "wd": (HIDDEN, INNER)}
    *keys, last = jax.random.split(key, len(shapes) + 1)
    draw = lambda k, shape: (jax.random.normal(k, shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)  # noqa: E731
    layers = {name: draw(k, (LAYERS, *shape)) for (name, shape), k in zip(shapes.items(), keys, strict=True)}
    layers |= {name: jnp.ones((LAYERS, HIDDEN), jnp.bfloat16) for name in ("input_norm", "post_norm")}
    return {"embed": draw(last, (VOCAB, HIDDEN)), "layers": layers, "norm": jnp.ones(HIDDEN, jnp.bfloat16)}


def main():
    params = random_params(jax.random.key(0))
    kv = {name: jnp.zeros((LAYERS, KV_HEADS, CONTEXT, HEAD_DIM), jnp.bfloat16) for name in "kv"}
    in_float32 = jax.tree.map(lambda a: a.astype(jnp.float32), (params, kv))

    small = dataclasses.replace(PROFILES["h200"], name="h200 with 4 SMs", workers=4)  # interpreting 132 of them would take minutes
    step = mk.jit(decode_step, target=small, interpret=True)
    traced = step.trace(params, kv, 0, 0)
    print("The decode step as fused phases:", traced.graph, sep="\n")
    print("\nWhat the search decided:", traced.schedule(), sep="\n")

    print("\nTwo steps of the kernel beside the float32 reference:")
    reference, (ref_params, ref_kv) = jax.jit(decode_step), in_float32
    token = 7
    for pos in range(2):
        ours, logits, kv = step(params, kv, token, pos)
        theirs, expected, ref_kv = reference(ref_params, ref_kv, token, pos)
        error = jnp.linalg.norm(logits - expected) / jnp.linalg.norm(expected)
        print(f"  position {pos}: token {int(ours)}, reference {int(theirs)}; relative error of the logits {error:.4f}")
        assert error < 0.02, "further from float32 than bfloat16 explains"
        token = int(theirs)


if __name__ == "__main__":
    main()
