"""Rotary embedding as people write it, of heads [heads, 64] by theta=1e4: name -> (function of heads and a position, dims, interleaved)."""

import jax
import jax.numpy as jnp
import numpy as np


def angles(pos, dims=64):
    return pos * (1e4 ** -(np.arange(0, dims, 2) / dims)).astype(np.float32)


def rotate_half(x):
    """Llama's and Qwen's, of transformers."""
    return jnp.concatenate([-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]], -1)


def twice(x, pos):
    angle = jnp.concatenate([angles(pos), angles(pos)])
    return x * jnp.cos(angle) + rotate_half(x) * jnp.sin(angle)


def neox(x, pos):
    rotated, passed = x[..., :16], x[..., 16:]
    angle = jnp.tile(angles(pos, 16), 2)
    return jnp.concatenate([rotated * jnp.cos(angle) + rotate_half(rotated) * jnp.sin(angle), passed], axis=-1)


@jax.jit
def split(x, pos):
    cos, sin = jnp.cos(angles(pos)), jnp.sin(angles(pos))
    lo, hi = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([lo * cos - hi * sin, lo * sin + hi * cos], axis=-1)


def cohere(x, pos):
    angle = jnp.repeat(angles(pos), 2)
    turned = jnp.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape)
    return x * jnp.cos(angle) + turned * jnp.sin(angle)


def pairs(x, pos):
    """Meta's, without complex numbers."""
    a, b = x.reshape(len(x), 32, 2)[..., 0], x.reshape(len(x), 32, 2)[..., 1]
    cos, sin = jnp.cos(angles(pos)), jnp.sin(angles(pos))
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x.shape)


def rolled(x, pos):
    sign = jnp.where(jnp.arange(64) < 32, -1.0, 1.0)
    angle = jnp.tile(angles(pos), 2)
    return x * jnp.cos(angle) + jnp.roll(x, 32, axis=-1) * sign * jnp.sin(angle)


def spread(x, pos):
    """Cosines and sines as large as the heads."""
    cos, sin = (jnp.broadcast_to(jnp.concatenate([f(angles(pos))] * 2), x.shape) for f in (jnp.cos, jnp.sin))
    return x * (cos + 0.0) + rotate_half(x) * sin


FORMS = {
    "rotate_half": (twice, 64, False),
    "a part, as in GPT-NeoX": (neox, 16, False),
    "split, in jax.jit": (split, 64, False),
    "cohere": (cohere, 64, True),
    "pairs": (pairs, 64, True),
    "rolled": (rolled, 64, False),
    "spread": (spread, 64, False),
}
