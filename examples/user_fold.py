"""An operator of the user's own: every row of a matrix at its L1 distance from a vector, as a fold.

Nothing here knows of tiles, shared memory or GPUs. A fold is given by what it does to one piece of the streamed axis; because its pieces
merge in any way, the search may cut that axis as it likes.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import mkdsl as mk
from mkdsl.schedule import PROFILES

HIDDEN, VOCAB = 128, 256


def step(carry, tile, piece):  # [rows], [rows, k], [k] -> [rows]
    return carry + jnp.sum(jnp.abs(tile.astype(jnp.float32) - piece), axis=-1)


def l1_distance(rows, x):
    """The L1 distance of x [k] from each row of rows [n, k]. Partial distances add up: mk.fold's default merge."""
    return mk.fold(step, rows, x, init=0.0, name="l1_distance")


def decode_step(params, kv, token, pos):
    """The next token is the one whose embedding lies nearest to a projection of this one's."""
    x = mk.embed(params["embed"], token)
    y = jnp.tanh(mk.linear(params["w"], mk.rms_norm(x)))
    scores = -l1_distance(params["embed"], y)
    return mk.argmax(scores), scores, kv


def check_laws(rows, x):
    """What a fold promises: any cut of the streamed axis, merged in any order, gives the same."""
    whole = l1_distance(rows, x)
    nothing = jnp.zeros(len(rows))
    for cut in (16, 32, 80):
        a, b = step(nothing, rows[:, :cut], x[:cut]), step(nothing, rows[:, cut:], x[cut:])
        np.testing.assert_allclose(a + b, whole, rtol=1e-5)
        np.testing.assert_allclose(b + a, whole, rtol=1e-5)
    print("laws hold: cut at 16, 32 and 80, merged either way round")


def main():
    keys = jax.random.split(jax.random.key(0), 3)
    draw = lambda key, *shape: (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)  # noqa: E731
    params = {"embed": draw(keys[0], VOCAB, HIDDEN), "w": draw(keys[1], HIDDEN, HIDDEN)}
    check_laws(params["embed"], jax.random.normal(keys[2], (HIDDEN,)))

    small = dataclasses.replace(PROFILES["h200"], name="h200 with 4 SMs", workers=4)
    kernel = mk.jit(decode_step, target=small, interpret=True)
    print(kernel.trace(params, (), 0, 0).schedule())
    for token in (3, 99):
        ours, scores, _ = kernel(params, (), token, 0)
        theirs, expected, _ = jax.jit(decode_step)(params, (), token, 0)
        error = jnp.abs(scores - expected).max() / jnp.abs(expected).max()
        print(f"after token {token}: nearest {int(ours)}, reference {int(theirs)}; relative error of the distances {error:.5f}")
        assert error < 0.01


if __name__ == "__main__":
    main()
