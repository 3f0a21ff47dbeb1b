"""Interpreted kernels, under the race detector, against the float32 reference of the same decode step."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mkdsl as mk
from mkdsl.lower import _kernel
from mkdsl.lower._machine import Machine
from mkdsl.models import DecoderConfig, decode_step, init_cache, random_params
from mkdsl.schedule import profile
from mkdsl.search import search
from mkdsl.search._candidates import padded
from mkdsl.search._cost import Model
from mkdsl.search._draft import draft, timed
from mkdsl.search._path import shortest_path
from mkdsl.search._handoffs import with_handoffs
from mkdsl.search._rings import RINGS, Choice, Prices, numbered

SMALL = dataclasses.replace(profile("H200"), name="h200 with 4 SMs", workers=4)
LLAMA = DecoderConfig(
    hidden=192, layers=2, heads=4, kv_heads=1, head_dim=64, intermediate=320, vocab=448, eps=1e-5, theta=1e4,
    scaling=mk.Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    tied=True, qk_norm=False, max_context=128, bos=None, eos=(),
)  # fmt: skip
MODELS = {
    "llama, group 4, tied": LLAMA,
    "smollm2's width and group 3": dataclasses.replace(LLAMA, hidden=576, heads=3, layers=1, scaling=None),
    "qwen3, group 2, head_dim 128": dataclasses.replace(LLAMA, heads=2, head_dim=128, qk_norm=True, tied=False, scaling=None),
}


def float32(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float32) if jnp.issubdtype(a.dtype, jnp.floating) else a, tree)


def compare(step, params, kv, token, pos, batch, tolerance=0.02, target=SMALL):
    """Runs the interpreted kernel and checks logits and cache; the last position of a batch of 16 lies past the cache."""
    got = mk.jit(step, batch=batch, target=target, interpret=True)(params, kv, token, pos)
    want = jax.jit(jax.vmap(step, (None, 0, 0, 0)))(float32(params), float32(kv), token, pos)
    error = jnp.linalg.norm(got[1] - want[1], axis=1) / jnp.linalg.norm(want[1], axis=1)
    assert float(error.max()) < tolerance
    for ours, theirs in zip(jax.tree.leaves(got[2]), jax.tree.leaves(want[2]), strict=True):
        np.testing.assert_allclose(np.asarray(ours, np.float32), theirs, atol=0.1, rtol=0.05)


def random_kv(kv):
    return jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape).astype(a.dtype), kv)


@pytest.mark.parametrize(("name", "batch"), [("llama, group 4, tied", 1), ("llama, group 4, tied", 3), ("llama, group 4, tied", 16),
                                             ("smollm2's width and group 3", 1), ("qwen3, group 2, head_dim 128", 3)])  # fmt: skip
def test_model_families(name, batch):
    config = MODELS[name]
    params = random_params(config, jax.random.key(1), jnp.bfloat16)
    kv = random_kv(init_cache(config, 128, batch=batch))
    pos = np.asarray([70, 0, 127, 64, 1, 2, 3, 63, 65, 9, 10, 11, 90, 100, 126, 5][:batch], np.int32)
    compare(decode_step(config), params, kv, np.arange(batch, dtype=np.int32) + 3, pos, batch)


def test_a_gpu_without_tma():
    """Its schedule, with a ring of less shared memory; interpret mode has one copy for all GPUs."""
    target, config = dataclasses.replace(profile("L20"), name="l20 with 4 SMs", workers=4), dataclasses.replace(LLAMA, layers=1)
    kv = random_kv(init_cache(config, 128, batch=2))
    params = random_params(config, jax.random.key(1), jnp.bfloat16)
    compare(decode_step(config), params, kv, np.asarray([3, 4]), np.asarray([70, 127]), 2, target=target)


@mk.tile
def squared_relu(x):
    return jnp.square(jax.nn.relu(x))


def parallel_layer(x, p, kv, pos):
    """Attention and MLP side by side, layer norm, biases: no model of this repository."""
    h = mk.layer_norm(x, p["norm"], p["shift"])
    q = mk.heads(mk.linear(p["wq"], h, p["bq"]), 2)
    k, v = mk.heads(mk.linear(p["wk"], h), 1), mk.heads(mk.linear(p["wv"], h, p["bv"]), 1)
    kv = mk.append(kv, k, v, pos)
    up = squared_relu(mk.linear(p["wu"], h))
    return x + mk.linear(p["wo"], mk.attention(q, kv, pos)) + mk.linear(p["wd"], up), kv


def sandwich_layer(x, p, kv, pos):
    """Norms before and after, soft-capped scores, a sliding window, tanh GELU: a Gemma-like layer."""
    h = mk.rms_norm(x, p["norm"])
    q, k = mk.rope(mk.heads(mk.linear(p["wq"], h), 2), pos), mk.rope(mk.heads(mk.linear(p["wk"], h), 1), pos)
    kv = mk.append(kv, k, mk.heads(mk.linear(p["wv"], h), 1), pos)
    x = x + mk.rms_norm(mk.linear(p["wo"], mk.attention(q, kv, pos, window=40, softcap=20.0)), p["shift"])
    h = mk.rms_norm(x, p["norm"])
    up = jax.nn.gelu(mk.linear(p["wu"], h), approximate=True) * mk.linear(p["wg"], h)
    return x + mk.rms_norm(mk.linear(p["wd"], up), p["shift"]), kv


def own_decoder(layer, cap):
    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token) * 2.0
        x, kv = mk.layers(layer, x, params["layers"], kv, pos)
        logits = mk.linear(params["head"], mk.rms_norm(x))
        logits = logits if cap is None else cap * jnp.tanh(logits / cap)
        return mk.argmax(logits), logits, kv

    return step


def with_tiles(graph, batch, gpu=SMALL, **wanted):
    """The best schedule in which phases have the fields that are asked for: wo={"parts": 4}."""
    ring = RINGS[0]
    choices = {
        name: [(i, c) for i, c in found if all(getattr(c.plan, k) == v for k, v in wanted.get(name, {}).items())]
        for name, found in numbered(graph, batch, gpu, ring).items()
    }
    price = Prices(graph, Model(graph, batch, gpu, ring, released=False, padded_batch=padded(batch)))
    best = shortest_path(graph, choices, price, ring.capacity(gpu, ring.window))
    return timed(graph, with_handoffs(graph, draft(graph, batch, "data", Choice(gpu, ring, ring.window, best))), gpu)


def own_params(layers=1, hidden=192, wide=320, vocab=128):
    keys = iter(jax.random.split(jax.random.key(5), 32))

    def draw(*shape):
        return (jax.random.normal(next(keys), shape) * shape[-1] ** -0.5).astype(jnp.bfloat16)

    shapes = {"wq": (128, hidden), "wk": (64, hidden), "wv": (64, hidden), "wo": (hidden, 128), "wu": (wide, hidden), "wg": (wide, hidden),
              "wd": (hidden, wide), "norm": (hidden,), "shift": (hidden,), "bq": (128,), "bv": (64,)}  # fmt: skip
    return {"embed": draw(vocab, hidden), "head": draw(vocab, hidden), "layers": {n: draw(layers, *s) for n, s in shapes.items()}}


@pytest.mark.parametrize(("layer", "cap"), [(parallel_layer, None), (sandwich_layer, 10.0)])
def test_decoders_that_are_not_in_the_repository(layer, cap):
    kv = random_kv(tuple(jnp.zeros((2, 1, 1, 64, 64), jnp.bfloat16) for _ in range(2)))
    compare(own_decoder(layer, cap), own_params(), kv, np.asarray([3, 99]), np.asarray([50, 13]), 2)


@pytest.mark.parametrize("which", [0, 1])
def test_phases_in_other_orders(which):
    """Attention and MLP side by side: a schedule may have either first, and either may add the residual."""
    step, params = own_decoder(parallel_layer, None), own_params()
    kv = random_kv(tuple(jnp.zeros((2, 1, 1, 64, 64), jnp.bfloat16) for _ in range(2)))
    args = params, kv, np.asarray([3, 99]), np.asarray([50, 13])
    traced = mk.jit(step, batch=2, target=SMALL, interpret=True).trace(*args)
    schedule = search(traced.graph.others[which], batch=2, target=SMALL)
    assert schedule.order != tuple(traced.graph.order)
    got = traced.lower(schedule=schedule).compile()(*args)
    want = jax.jit(jax.vmap(step, (None, 0, 0, 0)))(float32(params), float32(kv), *args[2:])[1]
    assert float(jnp.linalg.norm(got[1] - want) / jnp.linalg.norm(want)) < 0.02


@pytest.mark.parametrize(("batch", "parts"), [(1, 2), (1, 8), (2, 2), (4, 4)])
def test_splits_of_heads_that_no_tile_divides(batch, parts):
    """3 heads in 2, 4 or 8 parts, and fewer than 8 rows to merge them in."""
    config = dataclasses.replace(LLAMA, heads=3, head_dim=128, layers=1, scaling=None)
    params, kv = random_params(config, jax.random.key(1), jnp.bfloat16), random_kv(init_cache(config, 256, batch=batch))
    args = params, kv, np.arange(batch), np.asarray([250, 64, 100, 3])[:batch]
    traced = mk.jit(decode_step(config), batch=batch, target=SMALL, interpret=True).trace(*args)
    schedule = with_tiles(traced.graph, batch, attention={"splits": 4, "chunk": 64}, wo={"parts": parts})
    got = traced.lower(schedule=schedule).compile()(*args)
    want = jax.jit(jax.vmap(decode_step(config), (None, 0, 0, 0)))(float32(params), float32(kv), *args[2:])[1]
    assert float(jnp.linalg.norm(got[1] - want) / jnp.linalg.norm(want)) < 0.02


@pytest.mark.parametrize("batch", [1, 8])
def test_what_clusters_share(batch):
    """In phased form each worker folds its own tiles, what clusters split in space split in time."""
    config = dataclasses.replace(LLAMA, layers=1, scaling=None)
    params, kv = random_params(config, jax.random.key(1), jnp.bfloat16), random_kv(init_cache(config, 256, batch=batch))
    args = params, kv, np.arange(batch), np.asarray([250, 64, 100, 3, 0, 128, 255, 7])[:batch]
    traced = mk.jit(decode_step(config), batch=batch, target=SMALL, interpret=True).trace(*args)
    shared = {name: {"cluster": 2} for name in ("wq+wk+wv", "wo", "wg·wu", "wd", "embed")}
    schedule = with_tiles(traced.graph, batch, attention={"cluster": 2, "chunk": 64}, **shared)
    assert schedule.cluster == 2
    got = traced.lower(schedule=schedule).compile()(*args)
    want = jax.jit(jax.vmap(decode_step(config), (None, 0, 0, 0)))(float32(params), float32(kv), *args[2:])[1]
    assert float(jnp.linalg.norm(got[1] - want) / jnp.linalg.norm(want)) < 0.02


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_an_embedding_that_a_projection_is_added_to(batch):
    """Regression: with more than one sequence this was refused."""

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        logits = mk.linear(params["head"], x + mk.linear(params["wd"], jnp.square(mk.linear(params["wu"], x))))
        return mk.argmax(logits), logits, kv

    params = own_params()
    params |= {name: params["layers"][name][0] for name in ("wu", "wd")}
    token = np.arange(7, 7 + batch)
    got = mk.jit(step, batch=batch, target=SMALL, interpret=True)(params, (), token, np.zeros(batch, int))
    want = jax.vmap(step, (None, None, 0, 0), (0, 0, None))(float32(params), (), token, np.zeros(batch, int))
    assert float(jnp.linalg.norm(got[1] - want[1]) / jnp.linalg.norm(want[1])) < 0.02


def test_two_stacks_of_layers():
    """Two loops in one kernel: what the first carries out, the second carries on."""
    params, kv = own_params(layers=2), random_kv(tuple(jnp.zeros((2, 4, 1, 64, 64), jnp.bfloat16) for _ in range(2)))

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        x, first = mk.layers(sandwich_layer, x, params["layers"], kv["first"], pos)
        x, second = mk.layers(parallel_layer, x, params["more"], kv["second"], pos)
        logits = mk.linear(params["head"], mk.rms_norm(x))
        return mk.argmax(logits), logits, {"first": first, "second": second}

    caches = {"first": tuple(a[:, :2] for a in kv), "second": tuple(a[:, 2:] for a in kv)}
    compare(step, params | {"more": own_params(layers=2, wide=192)["layers"]}, caches, np.asarray([3, 99]), np.asarray([50, 13]), 2)


def test_past_the_cache_everything_is_nan_and_nothing_is_written():
    config = dataclasses.replace(LLAMA, layers=1)
    params, kv = random_params(config, jax.random.key(1), jnp.bfloat16), random_kv(init_cache(config, 64, batch=1))
    lowered = mk.jit(decode_step(config), batch=1, target=SMALL, interpret=True).lower(params, kv, np.zeros(1, int), np.zeros(1, int))
    _, logits, after = jax.jit(lowered.program)(params, kv, jnp.zeros(1, jnp.int32), jnp.full(1, 64, jnp.int32))
    assert bool(jnp.isnan(logits).all())
    for a, b in zip(jax.tree.leaves(kv), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


def test_own_fold_with_a_carry_of_two_arrays():
    def cosine(params, kv, token, pos):
        step = lambda c, tile, x: (c[0] + mk.dot(tile, x), c[1] + jnp.sum(tile.astype(jnp.float32) ** 2, -1))  # noqa: E731
        x = jnp.tanh(mk.linear(params["head"], mk.embed(params["embed"], token)))
        y = mk.fold(step, params["table"], x, init=(0.0, 0.0), finish=lambda c: c[0] * jax.lax.rsqrt(c[1]), name="cosine")
        return mk.argmax(y), y, kv

    params = own_params() | {"table": own_params()["embed"][:, :128]}
    got = mk.jit(cosine, batch=3, target=SMALL, interpret=True)(params, (), np.arange(3), np.zeros(3, int))
    want = jax.vmap(cosine, (None, None, 0, 0), (0, 0, None))(params, (), jnp.arange(3), jnp.zeros(3, int))
    np.testing.assert_allclose(got[1], want[1], atol=2e-2)


@pytest.mark.parametrize("batch", [1, 8])
def test_all_phases_in_one_launch(batch, monkeypatch):
    """A worker alone has nobody to hand over to, so that interpret mode can run mega form."""
    config, alone = dataclasses.replace(LLAMA, scaling=None), dataclasses.replace(SMALL, workers=1, clusters=())
    params, kv = random_params(config, jax.random.key(1), jnp.bfloat16), random_kv(init_cache(config, 128, batch=batch))
    args = params, kv, np.arange(batch), np.asarray([70, 64, 100, 3, 0, 127, 90, 7])[:batch]
    lowered = mk.jit(decode_step(config), batch=batch, target=alone, interpret=True).trace(*args).lower()
    program = dataclasses.replace(lowered.program, form="mega")
    monkeypatch.setattr(_kernel, "Machine", lambda *a: dataclasses.replace(Machine(*a), concurrent=False))
    got = jax.jit(lambda *a: program(*a))(*args)
    want = jax.jit(jax.vmap(decode_step(config), (None, 0, 0, 0)))(float32(params), float32(kv), *args[2:])
    assert float(jnp.linalg.norm(got[1] - want[1]) / jnp.linalg.norm(want[1])) < 0.02
