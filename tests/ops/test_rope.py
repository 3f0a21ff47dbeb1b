"""Rotary embedding against NumPy's complex numbers, and its scalings against formulas written one frequency at a time."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk
from mkdsl.ops import Rope, Scaling


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def turned(x, angles, *, dims=None, interleaved=False, amplitude=1.0):
    """Each pair as a complex number, turned by its angle."""
    half = (dims or x.shape[1]) // 2
    lo, hi = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    pairs = (x[:, lo] + 1j * x[:, hi].astype(float)) * amplitude * np.exp(1j * np.asarray(angles))
    out = x.astype(float)
    out[:, lo], out[:, hi] = pairs.real, pairs.imag
    return out


def plain(dims, theta=1e4):
    return [theta ** (-2 * i / dims) for i in range(dims // 2)]


@pytest.mark.medium
@settings(max_examples=25)
@given(half=st.integers(1, 16), rest=st.integers(0, 5), interleaved=st.booleans(), pos=st.integers(0, 500), seed=st.integers(0, 99))
def test_part_of_a_head_and_interleaved_pairs(half, rest, interleaved, pos, seed):
    x = normal(seed, 2, 2 * (half + rest))
    expected = turned(x, pos * np.asarray(plain(2 * half)), dims=2 * half, interleaved=interleaved)
    np.testing.assert_allclose(mk.rope(x, pos, dims=2 * half, interleaved=interleaved), expected, rtol=1e-3, atol=1e-4)


def test_what_is_not_rotated_passes_to_the_bit():
    x = normal(0, 2, 64).astype(jnp.bfloat16)
    x[0, 40], x[1, 63] = np.inf, np.nan
    got = mk.rope(x, 7, dims=24)
    np.testing.assert_array_equal(got[:, 24:], x[:, 24:].astype(np.float32))
    assert np.isfinite(np.asarray(got[:, :24], np.float32)).all()


def linear(length, dims):
    return [f / 3.0 for f in plain(dims)]


def dynamic(length, dims):
    theta = 1e4 * (4.0 * max(length, 100) / 100 - 3.0) ** (dims / (dims - 2))
    return plain(dims, theta)


def yarn(length, dims, truncate=True, fast=32.0, slow=1.0):
    def pair(turns):
        return dims * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(1e4))

    low, high = (math.floor(pair(fast)), math.ceil(pair(slow))) if truncate else (pair(fast), pair(slow))
    low, high = max(low, 0), min(high, dims - 1)
    ramp = [min(max((i - low) / (high - low), 0.0), 1.0) for i in range(dims // 2)]
    return [f / 8.0 * r + f * (1 - r) for f, r in zip(plain(dims), ramp, strict=True)]


SHORT, LONG = [1 + i / 9 for i in range(16)], [2.0 + i for i in range(16)]


def longrope(length, dims):
    return [f / factor for f, factor in zip(plain(dims), LONG if length > 100 else SHORT, strict=True)]


SCALINGS = {
    "linear": (mk.LinearScaling(factor=3.0), linear, 1.0),
    "dynamic": (mk.DynamicScaling(factor=4.0, max_position_embeddings=100), dynamic, 1.0),
    "yarn": (mk.YarnScaling(factor=8.0, original_max_position_embeddings=2048), yarn, 0.1 * math.log(8) + 1),
    "yarn with betas": (
        mk.YarnScaling(factor=8.0, original_max_position_embeddings=2048, beta_fast=16.0, beta_slow=2.0, truncate=False, attention_factor=0.7),
        lambda length, dims: yarn(length, dims, truncate=False, fast=16.0, slow=2.0),
        0.7,
    ),
    "yarn of deepseek": (
        mk.YarnScaling(factor=8.0, original_max_position_embeddings=2048, mscale=1.0, mscale_all_dim=0.5),
        yarn,
        (0.1 * math.log(8) + 1) / (0.05 * math.log(8) + 1),
    ),
    "longrope": (
        mk.LongRopeScaling(short_factor=SHORT, long_factor=LONG, original_max_position_embeddings=100, factor=4.0),  # pyright: ignore[reportArgumentType]
        longrope,
        math.sqrt(1 + math.log(4) / math.log(100)),
    ),
    "longrope with its amplitude": (
        mk.LongRopeScaling(short_factor=tuple(SHORT), long_factor=tuple(LONG), original_max_position_embeddings=100, attention_factor=1.25),
        longrope,
        1.25,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(name):
    """Each position as in a sequence that ends there: 99 is the last of the original context, 100 the first past it."""
    scaling, frequencies, amplitude = SCALINGS[name]
    rotate = jax.jit(lambda x, pos: mk.rope(x, pos, scaling=scaling, dims=32))
    x, passing = normal(1, 2, 48), slice(32, None)
    for pos in (0, 1, 99, 100, 777):
        expected = turned(x, pos * np.asarray(frequencies(pos + 1, 32)), dims=32, amplitude=amplitude)
        np.testing.assert_allclose(rotate(x, pos), expected, rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(rotate(x, pos)[:, passing], x[:, passing])


def test_the_scalings_of_the_test_differ():
    """From no scaling, and where they say so from one length to another."""
    for name, (_, frequencies, _) in SCALINGS.items():
        assert not np.allclose(frequencies(200, 32), plain(32)), name
        assert np.allclose(frequencies(200, 32), frequencies(50, 32)) == (name.split()[0] not in ("dynamic", "longrope")), name


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dims", [32, 48])
@pytest.mark.parametrize("name", [None, "dynamic", "longrope"])
def test_a_kernels_table_is_the_rotation_of_each_position(name, dims, interleaved):
    """And what a kernel makes of it is what the operator means."""
    scaling = SCALINGS[name][0] if name and dims == 32 else None
    op, x = Rope(1e4, scaling, dims, interleaved), normal(2, 2, 48)
    table, at = op.table(130, 48), np.arange(130)
    np.testing.assert_allclose(jax.vmap(lambda p: op.rotation(p, 48))(at), table, atol=5e-5)
    for pos in (3, 120):
        cos, sin = table[pos]
        if op.by_halves(48):
            cos, sin = np.tile(cos, 2), np.concatenate([-sin, sin])
        expected = mk.rope(x, pos, scaling=scaling, dims=dims, interleaved=interleaved)
        np.testing.assert_allclose(x * cos + op.partners(x) * sin, expected, atol=1e-4)


X = jnp.zeros((2, 8))
REFUSED = [
    (lambda: mk.rope(X, 0, dims=3), ValueError, "mk.rope: dims=3 of x.shape=(2, 8); rotate an even number of features up to 8"),
    (lambda: mk.rope(X, 0, dims=10), ValueError, "mk.rope: dims=10 of x.shape=(2, 8); rotate an even number of features up to 8"),
    (lambda: mk.rope(X, 0, dims=0), ValueError, "mk.rope: dims=0 of x.shape=(2, 8)"),
    (
        lambda: mk.rope(
            X, 0, scaling=mk.LongRopeScaling(short_factor=(1.0,) * 4, long_factor=(1.0,) * 3, original_max_position_embeddings=9)
        ),
        ValueError,
        "mk.rope: long_factor has 3 factors for dims=8; give one for each pair, so 4",
    ),
    (lambda: mk.rope(X, 0, scaling=2.0), TypeError, "mk.rope: scaling=2.0; pass one such as mk.YarnScaling("),  # pyright: ignore[reportArgumentType]
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSED)
def test_refusals(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_every_scaling_is_tried():
    assert {type(scaling) for scaling, *_ in SCALINGS.values()} == set(Scaling.__subclasses__()) - {
        mk.Llama3Scaling
    }  # tests/ops/test_operators.py
