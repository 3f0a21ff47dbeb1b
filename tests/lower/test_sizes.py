"""Interpreted kernels whose sizes are no multiples of 64: what fills a last tile must neither be looked at nor written over anything."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, arguments, check, check_schedule, traced, with_tiles

import mkdsl as mk
from mkdsl.lower.phases import _fold

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]


def layer_norm(x: jax.Array) -> jax.Array:
    return (x - jnp.mean(x)) / jnp.sqrt(jnp.var(x) + 1e-5) + jnp.max(x)


def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array, *, heads: int, kv_heads: int) -> Any:
    """Behind the features of a layer norm lie numbers, and behind those that are divided by weights NaN: none of them may count."""
    h = layer_norm(x) / p["norm"].astype(jnp.float32)
    q, k, v = (mk.heads(mk.linear(p[f"w{n}"], h) + p[f"b{n}"], count) for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)))
    kv = mk.append(kv, mk.rope(k, pos), v, pos)
    x = x + mk.linear(p["wo"], mk.attention(mk.rope(mk.rms_norm(q) * p["head"].astype(jnp.float32), pos), kv, pos))
    h = layer_norm(x)
    return x + mk.linear(p["wd"], jax.nn.silu(mk.linear(p["wg"], h)) * mk.linear(p["wu"], h) / p["scale"].astype(jnp.float32)), kv


def odd(hidden: int, heads: int, kv_heads: int, head_dim: int, inner: int, vocab: int, layers: int = 1) -> tiny.Decoder:
    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x, kv = mk.layers(
            lambda x, p, kv, pos: layer(x, p, kv, pos, heads=heads, kv_heads=kv_heads), mk.embed(params["embed"], token), params["layers"], kv, pos
        )  # fmt: skip
        logits = mk.linear(params["out"], layer_norm(x)) + params["bias"]
        return mk.argmax(logits), logits, kv

    q, k = heads * head_dim, kv_heads * head_dim
    rows = {
        "wq": (q, hidden),
        "wk": (k, hidden),
        "wv": (k, hidden),
        "wo": (hidden, q),
        "wg": (inner, hidden),
        "wu": (inner, hidden),
        "wd": (hidden, inner),
    }
    vectors = {"norm": (hidden,), "head": (head_dim,), "scale": (inner,), "bq": (q,), "bk": (k,), "bv": (k,)}
    drawn = tiny.drawn({name: (layers, *shape) for name, shape in (rows | vectors).items()}, 1)
    drawn |= {name: 1 + jnp.abs(drawn[name]) for name in ("norm", "head", "scale")}
    params = tiny.drawn({"embed": (vocab, hidden), "out": (vocab, hidden), "bias": (vocab,)}, 2)
    return tiny.Decoder(step, params | {"layers": drawn}, (layers, kv_heads, head_dim))


SIZES = {
    "all odd": (odd(100, 3, 1, 80, 60, 131, layers=2), 136, 3),
    "no row in whole blocks": (odd(321, 4, 4, 64, 61, 67, layers=2), 128, 1),
    "heads of 112": (odd(320, 4, 1, 112, 72, 67), 128, 16),
    "heads of 96": (odd(192, 4, 2, 96, 72, 67), 136, 2),
    "heads of 192": (odd(128, 2, 2, 192, 64, 64), 128, 1),
    "heads of 256": (odd(128, 2, 1, 256, 64, 64), 128, 1),
}
SLOW = ("no row in whole blocks", "heads of 96", "heads of 112", "heads of 192", "heads of 256")


@pytest.mark.parametrize("case", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in SIZES])
def test_sizes(case):
    decoder, context, batch = SIZES[case]
    args = arguments(decoder, batch, context)
    check(decoder, args, mk.jit(decoder.step, batch=batch, target=SMALL, interpret=True)(*args))


@pytest.mark.parametrize("batch", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_block_of_the_resident_that_reaches_over_heads(batch):
    """Its 64 columns lie in two heads of 80, whose splits are merged by log-sum-exps of their own."""
    decoder = tiny.attend(heads=4, head_dim=80)
    found = traced(decoder, args := arguments(decoder, batch, context=264))
    schedule = with_tiles(found.graph, batch, attention={"splits": 4, "block": 64}, wo={"split_k": 1, "tile_k": 64})
    check_schedule(decoder, args, schedule, found)


def test_a_users_fold_takes_whole_rows_of_a_multiple_of_16():
    """The step may be one to which zeros behind a row would not be neutral."""

    def largest(carry: jax.Array, tile: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.maximum(carry, jnp.max(tile * x, axis=-1))

    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x = mk.fold(largest, params["w"], mk.embed(params["embed"], token), init=-jnp.inf, merge=jnp.maximum)
        logits = mk.linear(params["out"], x)
        return mk.argmax(logits), logits, kv

    decoder = tiny.Decoder(step, tiny.drawn({"embed": (67, 80), "w": (50, 80), "out": (67, 50)}, 1), (1, 64))
    decoder.params["w"] = -jnp.abs(decoder.params["w"])  # so that zeros would be the largest
    decoder.params["embed"] = jnp.abs(decoder.params["embed"])
    args = arguments(decoder, 3)
    check(decoder, args, mk.jit(step, batch=3, target=SMALL, interpret=True)(*args))


@pytest.mark.parametrize(("rows", "behind"), [(64, False), (96, True), (8, True)])
def test_copies_without_tma_know_where_a_weight_ends(rows, behind, monkeypatch):
    """Regression: where a tile's rows divided those of all layers, whole tiles behind the last of them were read."""
    limits = []
    monkeypatch.setattr(_fold, "copy", lambda m, source, there, layout, slot, valid: limits.append(valid))

    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x, _ = mk.layers(
            lambda x, w, kv: (x + mk.linear(w["b"], mk.linear(w["a"], x)), kv), mk.embed(params["embed"], token), params["layers"], ()
        )
        return mk.linear(params["embed"], x)

    layers = {"a": jax.ShapeDtypeStruct((2, rows, 128), jnp.bfloat16), "b": jax.ShapeDtypeStruct((2, 128, rows), jnp.bfloat16)}
    params = {"embed": jax.ShapeDtypeStruct((128, 128), jnp.bfloat16), "layers": layers}
    mk.jit(step, batch=1, target="a100").lower(params, (), *(jax.ShapeDtypeStruct((1,), jnp.int32) for _ in range(2)))
    assert [limit is not None for limit in limits[:2]] == [behind, False]


@pytest.mark.parametrize("rank", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 8, 16, 64))])
def test_low_rank_adapters(rank):
    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x = mk.embed(params["embed"], token)
        x = mk.linear(params["w"], x) + mk.linear(params["b"], mk.linear(params["a"], x))
        logits = mk.linear(params["embed"], mk.rms_norm(x))
        return mk.argmax(logits), logits, kv

    decoder = tiny.Decoder(step, tiny.drawn({"embed": (70, 128), "w": (128, 128), "a": (rank, 128), "b": (128, rank)}, 3), (1, 64))
    args = arguments(decoder, 1)
    check(decoder, args, mk.jit(step, batch=1, target=SMALL, interpret=True)(*args))
