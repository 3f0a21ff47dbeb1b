"""Interpreted kernels of decode steps that use more of JAX than a transformer's layers need: positions in arithmetic, numbers, constants."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from elementwise import FUNCTIONS
from interpreted import SMALL, arguments, check

import mkdsl as mk

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]


def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array, *, window: int | None = None, at: Any = None, up_to: Any = None) -> Any:
    """Attention and a residual; keys and values are appended `at` a position, queries attend `up_to` one."""
    at, up_to = pos if at is None else at, pos if up_to is None else up_to
    h = mk.rms_norm(x)
    q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h), count) for n, count in (("q", 2), ("k", 2), ("v", 2)))
    kv = mk.append(kv, mk.rope(k, pos), v, at)
    return x + mk.linear(p["wo"], mk.attention(mk.rope(q, pos), kv, up_to, window=window)), kv


def decoder(step: Any, layers: int = 1, **more: Any) -> tiny.Decoder:
    shapes = {"wq": (layers, 128, 128), "wk": (layers, 128, 128), "wv": (layers, 128, 128), "wo": (layers, 128, 128)}
    params: dict[str, Any] = tiny.drawn({"embed": (192, 128)}, 2)
    return tiny.Decoder(step, params | {"layers": tiny.drawn(shapes, 3)} | more, (layers, 2, 64))


def run(d: tiny.Decoder, batch: int, args: Any = None) -> None:
    """Interpreted, it computes what the reference does; and it is emitted for a GPU."""
    args = args or arguments(d, batch)
    mk.jit(d.step, batch=batch, target=SMALL).lower(*args)
    check(d, args, mk.jit(d.step, batch=batch, target=SMALL, interpret=True)(*args))


def step_of(body: Any = layer, before: Any = lambda x, params, token, pos: x, after: Any = lambda y, params, token, pos: y) -> Any:
    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x = before(mk.embed(params["embed"], token), params, token, pos)
        x, kv = mk.layers(body, x, params["layers"], kv, pos)
        logits = after(mk.linear(params["embed"], mk.rms_norm(x)), params, token, pos)
        return mk.argmax(logits), logits, kv

    return step


def temperature(y: jax.Array, params: Any, token: jax.Array, pos: jax.Array) -> jax.Array:
    return y * jnp.log1p(pos.astype(jnp.float32)) / params["temperature"] + jnp.where(pos > 50, 1.0, -0.5)


def alternating(x: jax.Array, params: Any, token: jax.Array, pos: jax.Array) -> jax.Array:
    return x * jnp.where(jnp.arange(128) % 2 == 0, 1.5, 0.5) + 0.01 * pos.astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(16, marks=pytest.mark.slow)])
def test_positions_and_scalars_in_arithmetic(batch):
    d = decoder(step_of(before=alternating, after=temperature), temperature=jnp.float32(1.7))
    run(d, batch)


def test_a_cache_that_is_a_ring():
    """The last 64 positions, the newest over the oldest."""
    body = lambda x, p, kv, pos: layer(x, p, kv, pos, at=pos % 64, up_to=jnp.minimum(pos, 63))  # noqa: E731
    d = decoder(step_of(body))
    params, kv, token, _ = arguments(d, 4)
    kv = jax.tree.map(lambda a: a[:, :, :, :64], kv)
    run(d, 4, (params, kv, token, np.asarray([0, 63, 64, 1000], np.int32)))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_rotations_by_a_computed_position(batch):
    def body(x, p, kv, pos):
        h = mk.rms_norm(x)
        q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h), 2) for n in "qkv")
        kv = mk.append(kv, mk.rope(k, pos // 2), v, pos)
        return x + mk.linear(p["wo"], mk.attention(mk.rope(q, pos // 2), kv, pos)), kv

    run(decoder(step_of(body)), batch)


@pytest.mark.slow
def test_arithmetic_on_heads():
    """Leaves for each head and for each feature of a head, numbers, constants, positions, reductions over a head."""

    def body(x, p, kv, pos):
        h = mk.rms_norm(x)
        q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h), 2) for n in "qkv")
        q = q * p["each"] * p["same"] * (1 + 0.01 * jnp.arange(64, dtype=jnp.float32)) * p["gain"]
        kv = mk.append(kv, mk.rope(4 * jax.nn.softmax(k), pos), jnp.where(p["some"], v, -v), pos)
        return x + mk.linear(p["wo"], mk.attention(mk.rope(q, pos) / jnp.log1p(1.0 + pos), kv, pos)), kv

    d = decoder(step_of(body))
    d.params["layers"] |= tiny.drawn({"each": (1, 2, 64), "same": (1, 64)}, 9) | {
        "some": jnp.arange(64)[None] % 3 > 0,
        "gain": jnp.full(1, 9.0),
    }
    run(d, 3)


TABLE = np.asarray([0.5, -1.0, 2.0, 1.5], np.float32)


def anything(y: jax.Array, params: Any, token: jax.Array, pos: jax.Array) -> jax.Array:
    """Numbers that XLA computes before the kernel starts, with what a kernel has no word for; leaves of other types; half precision."""
    y = y * jnp.sum(jnp.where(jnp.arange(8) == pos % 8, TABLE.repeat(2), 0.0)) + jnp.sort(pos * jnp.arange(4))[1] * 0.01
    y = (
        y * (1 + params["scale"][pos])
        + jnp.asarray(TABLE)[pos % 4]
        + jax.lax.cond(pos > 50, lambda p: p >> 3, lambda p: -p, pos)
        + params["whole"]
    )
    y = jnp.where(params["on"], jnp.where(params["some"], y * params["one"], -y), 0) + jax.lax.population_count(token) * params["half"]
    return y + jax.nn.silu(y.astype(jnp.bfloat16)) + jnp.any(y > 3).astype(jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_any_expression_of_numbers_and_leaves_of_any_type(batch):
    leaves = {"whole": jnp.int32(3), "on": jnp.asarray(True), "some": jnp.arange(192) % 3 > 0, "one": jnp.full(1, 0.5, jnp.bfloat16)}
    run(decoder(step_of(after=anything), **leaves, half=jnp.float16(0.25), **tiny.drawn({"scale": (128,)}, 5)), batch)


@pytest.mark.slow
def test_results_of_other_types():
    def step(params, kv, token, pos):
        x, kv = layer(mk.embed(params["embed"], token), params["layer"], kv, pos)
        y = mk.linear(params["embed"], x)
        return mk.argmax(y), y, kv, jax.nn.softmax(y).astype(jnp.bfloat16), y > 0, x, jnp.where(pos > 3, mk.argmax(y), -1), pos * 2

    d = tiny.Decoder(
        step, tiny.drawn({"embed": (192, 128)}, 2) | {"layer": tiny.drawn(dict.fromkeys(("wq", "wk", "wv", "wo"), (128, 128)), 3)}, (2, 64)
    )
    args = arguments(d, 3)
    got, want = mk.jit(step, batch=3, target=SMALL, interpret=True)(*args), d.reference(*args[1:])
    check(d, args, got)
    for ours, theirs, exact in zip(got[3:], want[3:], (False, False, False, True, True), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(np.asarray(ours, np.float32), np.asarray(theirs, np.float32), atol=0 if exact else 0.05)


TABLE_OF_ITS_OWN, WEIGHT_OF_ITS_OWN = (np.asarray(a) for a in tiny.drawn({"table": (192, 128), "weight": (192, 128)}, 11).values())


def test_weights_that_a_step_holds_itself():
    """Regression: a table that was no leaf of params was looked up as a vector."""

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token) + mk.embed(jnp.asarray(TABLE_OF_ITS_OWN), token)
        y = mk.linear(jnp.asarray(WEIGHT_OF_ITS_OWN), mk.rms_norm(x))
        return mk.argmax(y), y, kv

    d = tiny.Decoder(step, tiny.drawn({"embed": (192, 128)}, 2), ())
    run(d, 3, (d.params, (), np.arange(3), np.zeros(3, int)))


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 3])
def test_numbers_of_each_layer_and_folds_that_nobody_uses(batch):
    """As [layers], as [layers, 1], in bfloat16, and a flag; before the projections and after them."""

    def body(x, p, kv, pos):
        number = jnp.where(p["on"], 1.0, -1.0) * p["gain"] * jax.lax.cond(pos > 50, lambda q: q // 8, lambda q: q + 1, pos)
        mk.argmax(mk.linear(p["wo"], x))
        y, kv = layer(x * number, p, kv, pos)
        return jnp.where(p["on"], x + p["half"] * y * jnp.mean(y * y, keepdims=True).reshape(()), x) + p["shift"].reshape(-1), kv

    d = decoder(step_of(body), layers=2)
    numbers = {"gain": jnp.asarray([[0.5], [0.25]], jnp.bfloat16), "half": jnp.asarray([0.5, 1.5], jnp.float32)}
    d.params["layers"] |= numbers | {"on": jnp.asarray([True, False]), "shift": tiny.drawn({"shift": (2, 2, 64)}, 9)["shift"]}
    run(d, batch)


NAMES = sorted(FUNCTIONS)


@pytest.mark.parametrize("names", [NAMES[i::5] for i in range(5)], ids=" ".join)
def test_elementwise_functions(names):
    """In the epilogue of a single fold."""

    def step(params, kv, token, pos):
        y = mk.linear(params["embed"], mk.rms_norm(mk.embed(params["embed"], token)))
        logits = y + sum(FUNCTIONS[n](0.25 * y) for n in names)
        return mk.argmax(logits), logits, kv

    d = tiny.Decoder(step, tiny.drawn({"embed": (192, 128)}, 2), ())
    run(d, 1, (d.params, (), np.asarray([3]), np.asarray([70])))
