"""Operators against numpy in float64, over random shapes, under jit, vmap and eval_shape."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mkdsl as mk

few = settings(max_examples=8, deadline=None)
sizes, seeds = st.integers(1, 24), st.integers(0, 99)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check(f, expected, *args, rtol=2e-5, atol=2e-5):
    """f(*args) as it is, under vmap and under eval_shape, all inside one jit: tracing and compiling are what takes time here."""
    plain, twice = jax.jit(lambda *a: (f(*a), jax.vmap(f)(*(jnp.stack([x, x]) for x in a))))(*args)
    assert jax.eval_shape(f, *args) == jax.ShapeDtypeStruct(plain.shape, plain.dtype)
    for found in (plain, *twice):
        np.testing.assert_allclose(found, expected, rtol=rtol, atol=atol)


def test_operators_run_eagerly_too():
    w, x = normal(0, 3, 8), normal(1, 8)
    np.testing.assert_allclose(mk.linear(w, mk.rms_norm(x)), w @ (x / np.sqrt((x**2).mean() + 1e-6)), rtol=1e-5, atol=1e-5)
    kv = mk.append((np.zeros((1, 4, 8), np.float32),) * 2, x[None], 2 * x[None], 0)
    np.testing.assert_allclose(mk.attention(mk.rope(x[None], 0), kv, 0), 2 * x, rtol=1e-5)


@pytest.mark.medium
@few
@given(rows=sizes, k=sizes, bias=st.booleans(), seed=seeds)
def test_linear(rows, k, bias, seed):
    w, x, b = normal(seed, rows, k), normal(seed + 1, k), normal(seed + 2, rows)
    expected = w.astype(float) @ x + (b if bias else 0)
    check(lambda w, x, b: mk.linear(w, x, b if bias else None), expected, w, x, b)


def test_linear_rounds_its_operand_and_sums_in_float32():
    w, x = jnp.asarray(normal(0, 8, 512), jnp.bfloat16), normal(1, 512)
    found = mk.linear(w, x)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, np.float64(w) @ np.float64(jnp.bfloat16(x)), rtol=1e-5, atol=1e-5)


def attention(q, k, v, pos, scale, window, softcap):
    """Attention of one token in float64, head by head."""
    group = len(q) // len(k)
    out = []
    for h, query in enumerate(q.astype(float)):
        first = 0 if window is None else max(0, pos - window + 1)
        keys, values = (c[h // group, first : pos + 1].astype(float) for c in (k, v))
        s = keys @ query * scale
        s = s if softcap is None else softcap * np.tanh(s / softcap)
        p = np.exp(s - s.max())
        out.append(p @ values / p.sum())
    return np.concatenate(out)


@pytest.mark.medium
@few
@given(
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    half=st.integers(1, 8),
    context=st.integers(1, 20),
    scale=st.sampled_from([None, 0.2]),
    window=st.sampled_from([None, 1, 5, 100]),
    softcap=st.sampled_from([None, 1.5]),
    data=st.data(),
)
def test_attention(kv_heads, group, half, context, scale, window, softcap, data):
    pos, seed = data.draw(st.integers(0, context - 1)), data.draw(seeds)
    q = normal(seed, kv_heads * group, 2 * half)
    k, v = (normal(seed + i, kv_heads, context, 2 * half) for i in (1, 2))
    expected = attention(q, k, v, pos, (2 * half) ** -0.5 if scale is None else scale, window, softcap)
    options = {"scale": scale, "window": window, "softcap": softcap}
    check(lambda q, k, v, p: mk.attention(q, {"k": k, "v": v}, p, **options), expected, q, k, v, np.int32(pos))


def test_attention_past_the_cache_is_nan():
    q, kv = normal(0, 2, 4), (normal(1, 1, 3, 4), normal(2, 1, 3, 4))
    assert np.isnan(mk.attention(q, kv, 3)).all()
    assert np.isfinite(mk.attention(q, kv, 2)).all()


@pytest.mark.medium
@few
@given(count=st.sampled_from([None, 3]), width=st.integers(1, 40), weight=st.booleans(), seed=seeds)
def test_rms_norm(count, width, weight, seed):
    x = normal(seed, *([] if count is None else [count]), width)
    w = normal(seed + 1, width)
    expected = x / np.sqrt((x.astype(float) ** 2).mean(-1, keepdims=True) + 1e-3) * (w if weight else 1)
    check(lambda x, w: mk.rms_norm(x, w if weight else None, eps=1e-3), expected, x, w)


@pytest.mark.medium
@few
@given(count=st.sampled_from([None, 3]), width=st.integers(2, 40), weight=st.booleans(), bias=st.booleans(), seed=seeds)
def test_layer_norm(count, width, weight, bias, seed):
    x = normal(seed, *([] if count is None else [count]), width)
    w, b = normal(seed + 1, width), normal(seed + 2, width)
    centred = x.astype(float) - x.mean(-1, keepdims=True, dtype=float)
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-2) * (w if weight else 1) + (b if bias else 0)
    check(lambda x, w, b: mk.layer_norm(x, w if weight else None, b if bias else None, eps=1e-2), expected, x, w, b)


def rotated(x, pos, frequencies):
    """Each pair (i, i + half) as a complex number, turned."""
    half = x.shape[1] // 2
    turned = (x[:, :half] + 1j * x[:, half:].astype(float)) * np.exp(1j * pos * np.asarray(frequencies))
    return np.concatenate([turned.real, turned.imag], 1)


@pytest.mark.medium
@few
@given(heads=st.integers(1, 3), half=st.integers(1, 16), pos=st.integers(0, 500), theta=st.sampled_from([1e4, 5e5]), seed=seeds)
def test_rope(heads, half, pos, theta, seed):
    x = normal(seed, heads, 2 * half)
    frequencies = [theta ** (-i / half) for i in range(half)]
    check(lambda x, p: mk.rope(x, p, theta=theta), rotated(x, pos, frequencies), x, np.int32(pos), rtol=1e-3, atol=1e-4)


def llama3(frequency, factor, low, high, old):
    """Llama 3.1's rule, from its reference implementation, one frequency at a time."""
    wavelength = 2 * math.pi / frequency
    if wavelength < old / high:
        return frequency
    if wavelength > old / low:
        return frequency / factor
    smooth = (old / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / factor + smooth * frequency


@pytest.mark.parametrize("pos", [0, 1, 77, 4000])
def test_rope_with_llama3_scaling(pos):
    x = normal(3, 2, 64)
    frequencies = [llama3(500_000.0 ** (-i / 32), 8.0, 1.0, 4.0, 8192) for i in range(32)]
    assert len({f / 500_000.0 ** (-i / 32) for i, f in enumerate(frequencies)}) > 2  # kept, slowed and blended ones
    scaling = mk.Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
    expected = rotated(x, pos, frequencies)
    check(lambda x, p: mk.rope(x, p, theta=500_000.0, scaling=scaling), expected, x, np.int32(pos), rtol=1e-3, atol=2e-3)


def test_rope_keeps_relative_positions():
    q, k = normal(0, 1, 16), normal(1, 1, 16)

    def score(i, j):
        return (mk.rope(q, i) @ mk.rope(k, j).T).item()

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-3)


@few
@given(count=st.integers(1, 6), head_dim=sizes)
def test_heads(count, head_dim):
    x = normal(0, count * head_dim)
    check(lambda x: mk.heads(x, count), x.reshape(count, head_dim), x)


@pytest.mark.medium
@few
@given(kv_heads=st.integers(1, 3), context=st.integers(1, 9), pos=st.integers(0, 12), seed=seeds)
def test_append_writes_one_position_and_nothing_past_the_end(kv_heads, context, pos, seed):
    cache = {"k": normal(seed, kv_heads, context, 4), "v": normal(seed + 1, kv_heads, context, 4)}
    new = {name: normal(seed + i, kv_heads, 4) for i, name in enumerate("kv", 2)}
    for which in "kv":
        expected = cache[which].copy()
        expected[:, pos : pos + 1] = new[which][:, None]  # an empty slice past the end
        args = (cache["k"], cache["v"], new["k"], new["v"], np.int32(pos))
        check(lambda k, v, nk, nv, p, w=which: mk.append({"k": k, "v": v}, nk, nv, p)[w], expected, *args)


def test_append_rounds_to_the_cache_and_keeps_its_structure():
    cache = tuple(jnp.zeros((1, 4, 2), jnp.bfloat16) for _ in range(2))
    k, v = mk.append(cache, jnp.full((1, 2), 1.003), jnp.ones((1, 2)), 1)
    assert k.dtype == v.dtype == jnp.bfloat16
    assert k[0, 1, 0] == jnp.bfloat16(1.003)


@pytest.mark.medium
@few
@given(rows=sizes, width=sizes, data=st.data())
def test_embed(rows, width, data):
    table, row = normal(0, rows, width), data.draw(st.integers(0, rows - 1))
    check(lambda t, i: mk.embed(t, i), table[row], table, np.int32(row))
    assert mk.embed(jnp.asarray(table, jnp.bfloat16), row).dtype == jnp.float32


@few
@given(x=st.lists(st.integers(-5, 5), min_size=1, max_size=20))
def test_argmax_takes_the_first_of_equals(x):
    check(mk.argmax, x.index(max(x)), np.array(x, np.float32))
    assert mk.argmax(np.array(x, np.float32)).dtype == jnp.int32


def test_tile_names_a_function():
    @mk.tile
    def doubled(x):
        return 2 * x

    assert "name=doubled" in str(jax.make_jaxpr(lambda x: doubled(x))(1.0))
    np.testing.assert_array_equal(jax.vmap(doubled)(jnp.arange(3.0)), [0, 2, 4])
