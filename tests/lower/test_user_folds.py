"""Folds of the user's own: interpreted kernels against their plain meaning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import SMALL

import mkdsl as mk

pytestmark = pytest.mark.usefixtures("race_detector")

PARAMS = tiny.drawn({"embed": (64, 128), "table": (128, 128)}, 6)


def check(fold, batch: int) -> None:
    """The kernel's result is that of `fold(table, x)` in plain JAX."""

    def step(params, kv, token, pos):
        y = fold(params["table"], mk.embed(params["embed"], token))
        return mk.argmax(y), y, kv

    args = PARAMS, (), np.arange(batch), np.zeros(batch, int)
    mk.jit(step, batch=batch, target=SMALL).lower(*args)  # is emitted for a GPU
    got = mk.jit(step, batch=batch, target=SMALL, interpret=True)(*args)
    want = jax.vmap(step, (None, None, 0, 0), (0, 0, None))(*args)
    np.testing.assert_allclose(got[1], want[1], atol=2e-2)


@pytest.mark.medium
@pytest.mark.parametrize("batch", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_carry_of_two_arrays(batch):
    def step(carry, tile, x):
        return carry[0] + mk.dot(tile, x), carry[1] + jnp.sum(tile.astype(jnp.float32) ** 2, -1)

    check(lambda t, x: mk.fold(step, t, x, init=(0.0, 0.0), finish=lambda c: c[0] * jax.lax.rsqrt(c[1]), name="cosine"), batch)


@pytest.mark.medium
def test_a_maximum():
    def step(carry, tile, x):
        return jnp.maximum(carry, jnp.max(tile.astype(jnp.float32) + x, -1))

    check(lambda t, x: mk.fold(step, t, x, init=-jnp.inf, merge=jnp.maximum, name="max_plus"), 1)


def distance(tile, x):
    return jnp.sum(jnp.abs(tile.astype(jnp.float32) - x), -1)


@jax.custom_jvp
def with_derivative(tile, x):
    return distance(tile, x)


@with_derivative.defjvp
def _(primals, tangents):
    raise NotImplementedError


@jax.custom_vjp
def with_gradient(tile, x):
    return distance(tile, x)


with_gradient.defvjp(lambda tile, x: (distance(tile, x), None), lambda _, g: (g, g))
CALLS = (
    jax.jit(distance),
    jax.named_call(distance, name="distance"),
    jax.checkpoint(distance),
    jax.jit(jax.checkpoint(distance)),
    with_derivative,
    with_gradient,
    lambda tile, x: jnp.sum(jax.nn.relu(tile.astype(jnp.float32) - x), -1),  # a custom_jvp of JAX's own
    lambda tile, x: jnp.sum(jnp.log1p(jnp.abs(tile - x)) * jnp.floor(x), -1),  # composed of what a kernel has
    lambda tile, x: 0.1 * jnp.sum(jnp.exp(tile).astype(jnp.float32), -1),  # in bfloat16, which XLA need not round to
    jax.jit(functools.partial(lambda half, tile, x: half * distance(tile, x), jnp.float32(0.5))),  # holds a constant
)


@pytest.mark.medium
def test_a_step_that_calls_functions():
    """Regression: under jax.checkpoint, lowering died with TracerArrayConversionError."""
    check(lambda t, x: mk.fold(lambda carry, tile, x: sum((f(tile, x) for f in CALLS), carry), t, x, name="distance"), 1)


def test_a_step_that_has_no_lowering():
    with pytest.raises(
        mk.UnsupportedError, match=r"test_user_folds.py:\d+.*: fold's step uses cumsum on \[\(64, \d+\)\]; a step is elementwise jnp"
    ):
        check(lambda t, x: mk.fold(lambda carry, tile, x: carry + jnp.cumsum(tile, -1)[:, -1].astype(jnp.float32), t, x), 1)
