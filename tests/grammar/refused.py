"""What a decode step must not say, each as a function of the residual stream."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import mkdsl as mk


def _nested(x: jax.Array, p: Any) -> jax.Array:
    """A scan in a scan."""
    inner = lambda x: lax.scan(lambda x, w: (x + w.astype(jnp.float32)[0, 0], None), x, p["stacks"][0]["wq"])[0]  # noqa: E731
    return lax.scan(lambda x, w: (inner(x) + w.astype(jnp.float32), None), x, p["stacks"][0]["norm_a"])[0]


REFUSED: dict[str, Callable[..., Any]] = {
    "matrix product": lambda x, p, token, pos: p["top"]["wd"].astype(jnp.float32) @ jnp.tanh(p["top"]["wu"].astype(jnp.float32) @ x),
    "outer product": lambda x, p, token, pos: (x[:, None] * x[None, :]).sum(-1),
    "slice": lambda x, p, token, pos: x + x[: x.shape[0] // 2].sum(),
    "concatenate": lambda x, p, token, pos: x + jnp.concatenate([x, x]).sum(),
    "halves": lambda x, p, token, pos: jnp.concatenate(jnp.split(x, 2)[::-1]),
    "roll": lambda x, p, token, pos: jnp.roll(x, 1),
    "top_k": lambda x, p, token, pos: x + lax.top_k(x, 3)[0].sum(),
    "argmax": lambda x, p, token, pos: x * jnp.argmax(x),
    "argmin": lambda x, p, token, pos: x + jnp.argmin(x),
    "mk.argmax": lambda x, p, token, pos: x * mk.argmax(x),
    "sort": lambda x, p, token, pos: jnp.sort(x),
    "median": lambda x, p, token, pos: x - jnp.median(x),
    "rev": lambda x, p, token, pos: x[::-1],
    "cumsum": lambda x, p, token, pos: jnp.cumsum(x),
    "gather": lambda x, p, token, pos: x + x[token],
    "scatter": lambda x, p, token, pos: x.at[token].set(0),
    "transpose": lambda x, p, token, pos: x.reshape(2, -1).T.reshape(-1),
    "sum over heads": lambda x, p, token, pos: x + x.reshape(2, -1).sum(0).sum(),
    "random": lambda x, p, token, pos: x + jax.random.normal(jax.random.key(0), x.shape) * pos,
    "lgamma": lambda x, p, token, pos: lax.lgamma(x),
    "cond": lambda x, p, token, pos: lax.cond(pos > 3, jnp.sin, jnp.cos, x),
    "switch": lambda x, p, token, pos: lax.switch(pos % 3, [jnp.sin, jnp.cos, jnp.tanh], x),
    "while": lambda x, p, token, pos: lax.while_loop(lambda x: x.sum() < 1, lambda x: x + 1, x),
    "scan in scan": lambda x, p, token, pos: _nested(x, p),
    "layer by number": lambda x, p, token, pos: mk.linear(p["stacks"][0]["wu"][pos % 2], x)[:1] + x,
    "computed weight": lambda x, p, token, pos: mk.linear(p["top"]["wd"], mk.linear(p["top"]["wu"] * 2, x)),
    "transposed weight": lambda x, p, token, pos: mk.linear(p["top"]["wu"].T, mk.linear(p["top"]["wu"], x)),
    "embedding of a choice": lambda x, p, token, pos: x + mk.embed(p["embed"], mk.argmax(x)),
    "append alone": lambda x, p, token, pos: x + mk.append(_cache(x), _one(x), _one(x), pos)[0].astype(jnp.float32).sum(),
    "attention alone": lambda x, p, token, pos: x + mk.attention(_one(x), _cache(x), pos).sum(),
    "fft": lambda x, p, token, pos: jnp.abs(jnp.fft.fft(x)),
    "complex": lambda x, p, token, pos: jnp.real(jnp.exp(1j * x)),
    "convolution": lambda x, p, token, pos: jnp.convolve(x, jnp.ones(3), mode="same"),
    "product": lambda x, p, token, pos: x * jnp.prod(x),
}


def _one(x: jax.Array) -> jax.Array:
    return x[None]


def _cache(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (jnp.zeros((1, 64, x.shape[0]), jnp.bfloat16),) * 2
