"""Interpreted kernels that rotate part of a head, or interleaved pairs, or not in every layer, under the race detector."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import tiny_decoders as tiny
from by_hand import FORMS
from interpreted import SMALL, arguments, check

import mkdsl as mk
from mkdsl.gpu import assemble

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]
YARN = mk.YarnScaling(factor=4.0, original_max_position_embeddings=32)
DYNAMIC = mk.DynamicScaling(factor=4.0, max_position_embeddings=32)


def has_gpu() -> bool:
    return jax.default_backend() == "gpu"


@functools.cache
def decoder(
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    slower: int = 1,
    layers: int = 0,
    by_layer: bool = False,
    by_hand: str = "",
    **rotation: Any,
) -> tiny.Decoder:
    """Attention with a norm and a bias of each head before the rotation, which nothing of this may disturb."""

    def turn(x: jax.Array, p: Any, pos: jax.Array) -> jax.Array:
        at = pos // slower if slower > 1 else pos
        rotated = FORMS[by_hand][0](x, at) if by_hand else mk.rope(x, at, **rotation)
        return jnp.where(p["rotates"] > 0, rotated, x) if by_layer else rotated

    def layer(x: jax.Array, p: Any, kv: Any, pos: jax.Array) -> Any:
        q, k, v = (
            mk.heads(mk.linear(p[f"w{n}"], x, p[f"bias_{n}"]), count) for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = turn(mk.rms_norm(q, 1 + p["head_norm"].astype(jnp.float32)), p, pos), turn(mk.rms_norm(k), p, pos)
        kv = mk.append(kv, k, v, pos)
        return x + mk.linear(p["wo"], mk.attention(q, kv, pos)), kv

    def step(params: Any, kv: Any, token: jax.Array, pos: jax.Array) -> Any:
        x = mk.embed(params["embed"], token)
        x, kv = mk.layers(layer, x, params["layer"], kv, pos) if layers else layer(x, params["layer"], kv, pos)
        logits = mk.linear(params["embed"], x)
        return mk.argmax(logits), logits, kv

    q, k = heads * head_dim, kv_heads * head_dim
    shapes = {
        "wq": (q, 128),
        "wk": (k, 128),
        "wv": (k, 128),
        "wo": (128, q),
        "bias_q": (q,),
        "bias_k": (k,),
        "bias_v": (k,),
        "head_norm": (head_dim,),
    }
    params: dict[str, Any] = tiny.drawn({"embed": (128, 128)}, 2)
    params["layer"] = tiny.drawn({name: (layers, *shape) if layers else shape for name, shape in shapes.items()}, 3)
    if by_layer:
        params["layer"]["rotates"] = jnp.arange(layers, dtype=jnp.bfloat16) % 2
    return tiny.Decoder(step, params, (layers, kv_heads, head_dim) if layers else (kv_heads, head_dim))


def run(of: tiny.Decoder, batch: int = 1) -> None:
    args = arguments(of, batch)
    check(of, args, mk.jit(of.step, batch=batch, target=SMALL, interpret=True)(*args))


def test_interleaved_pairs_of_part_of_a_head():
    run(decoder(heads=2, kv_heads=1, head_dim=64, dims=24, interleaved=True))


ROTATIONS: list[dict[str, Any]] = [
    {"dims": 16},
    {"dims": 48, "scaling": YARN},
    {"interleaved": True},
    {"scaling": DYNAMIC},
    {"dims": 32, "scaling": DYNAMIC, "slower": 2},
    {"dims": 32, "interleaved": True, "head_dim": 96, "heads": 3, "kv_heads": 1},
    {"dims": 128, "head_dim": 256, "heads": 2, "kv_heads": 2},
    {"layers": 3, "by_layer": True},
    {"layers": 2, "by_layer": True, "dims": 32},
    *({"by_hand": name} for name in FORMS),
    {"by_hand": "cohere", "layers": 2, "slower": 2},
]


def rotating(of: dict[str, Any]) -> tiny.Decoder:
    return decoder(**{"heads": 6, "kv_heads": 2, "head_dim": 64} | of)


@pytest.mark.slow
@pytest.mark.parametrize("of", ROTATIONS, ids=str)
def test_rotations(of):
    run(rotating(of), 3)


@pytest.mark.slow
@pytest.mark.parametrize("of", [r for r in ROTATIONS if {"dims", "interleaved", "by_hand"} & set(r)], ids=str)
def test_features_are_exchanged_in_registers_that_there_are(of):
    d = rotating(of)
    found = mk.jit(d.step, batch=3, target="h200").trace(*arguments(d, 3))
    lowered = found.lower()
    (kernel,) = assemble(lowered.program, *lowered.signature, capability=found.target.capability)
    assert kernel.spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="needs a GPU")
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("of", ROTATIONS, ids=str)
def test_rotations_on_a_gpu(of, batch):
    d = rotating(of)
    args = arguments(d, batch)
    check(d, args, mk.jit(d.step, batch=batch)(*args))
