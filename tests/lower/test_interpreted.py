"""Interpreted kernels of whole decoders, under the race detector, against the float32 reference of the same decode step."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import SMALL, arguments, check, check_schedule, traced

import mkdsl as mk
from mkdsl.schedule import profile
from mkdsl.search import search

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]

SCALING = mk.Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
LLAMA = dataclasses.replace(tiny.LLAMA, hidden=192, intermediate=320, vocab=448, tied=True, scaling=SCALING)
ONE_LAYER = dataclasses.replace(LLAMA, layers=1)
SMOL = dataclasses.replace(ONE_LAYER, hidden=576, heads=3, scaling=None)  # 576 features, and groups of 3 heads: no powers of two
QWEN3 = dataclasses.replace(ONE_LAYER, heads=2, head_dim=128, qk_norm=True, tied=False, scaling=None)


def run(decoder: tiny.Decoder, batch: int, target: Any = SMALL) -> None:
    """Runs the searched schedule's kernels and checks them."""
    args = arguments(decoder, batch)
    check(decoder, args, mk.jit(decoder.step, batch=batch, target=target, interpret=True)(*args))


@pytest.mark.parametrize(
    ("config", "batch"),
    [
        pytest.param(LLAMA, 1, id="llama, 2 layers"),
        pytest.param(ONE_LAYER, 16, id="llama, two groups of columns", marks=pytest.mark.slow),
        pytest.param(SMOL, 1, id="smollm2", marks=pytest.mark.slow),
        pytest.param(QWEN3, 3, id="qwen3, padded batch", marks=pytest.mark.slow),
    ],
)
def test_model_families(config, batch):
    run(tiny.of(config), batch)


@pytest.mark.slow
def test_two_groups_of_columns():
    run(tiny.attend(), 16)


@pytest.mark.slow  # tests/grammar draws such decoders, and a faster evaluator tries a thousand
@pytest.mark.parametrize("decoder", [tiny.parallel, tiny.gemma])
def test_decoders_that_are_not_in_the_repository(decoder):
    run(decoder(), 2)


@pytest.mark.slow
def test_two_stacks_of_layers():
    """Two loops in one kernel: what the first carries out, the second carries on. Norms before and after, a window, soft-caps, tanh GELU."""

    def mlp(x, p, kv, pos):
        return x + mk.linear(p["down"], jax.nn.relu(mk.linear(p["up"], mk.rms_norm(x)))), kv

    def step(params, kv, token, pos):
        x, kv = mk.layers(tiny.gemma_layer, mk.embed(params["embed"], token), params["layers"], kv, pos)
        x, _ = mk.layers(mlp, x, params["more"], (), pos)
        logits = 30 * jnp.tanh(mk.linear(params["embed"], x) / 30)
        return mk.argmax(logits), logits, kv

    gemma, more = tiny.gemma(), tiny.drawn({"up": (2, 128, 192), "down": (2, 192, 128)}, 7)
    run(tiny.Decoder(step, gemma.params | {"more": more}, gemma.shape), 2)


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 1])
def test_phases_in_other_orders(which):
    """Attention and MLP side by side: a schedule may have either first, and either may add the residual."""
    decoder = tiny.parallel(layers=1)
    found = traced(decoder, args := arguments(decoder, 2))
    schedule = search(found.graph.others[which], batch=2, target=SMALL)
    assert schedule.order != tuple(found.graph.order)
    check_schedule(decoder, args, schedule, found)


def test_a_gpu_without_tma():
    """Its schedule, with a ring of less shared memory. Interpret mode has one copy for all GPUs, TMA's."""
    target, decoder = dataclasses.replace(profile("L20"), name="l20 with 4 SMs", workers=4), tiny.attend()
    found = traced(decoder, args := arguments(decoder, 2), target)
    lowered = found.lower()
    assert lowered.program.tma and not target.tma
    check(decoder, args, lowered.compile()(*args))


@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_an_embedding_that_a_projection_is_added_to(batch):
    """Regression: with more than one sequence this was refused."""

    def step(params, kv, token, pos):
        x = mk.embed(params["embed"], token)
        logits = mk.linear(params["head"], x + mk.linear(params["wd"], jnp.square(mk.linear(params["wu"], x))))
        return mk.argmax(logits), logits, kv

    params = tiny.drawn({"embed": (128, 192), "head": (128, 192), "wu": (320, 192), "wd": (192, 320)}, 5)
    args = params, (), np.arange(batch), np.zeros(batch, int)
    check(tiny.Decoder(step, params, (0, 0, 0)), args, mk.jit(step, batch=batch, target=SMALL, interpret=True)(*args))


def test_past_the_cache_everything_is_nan_and_nothing_is_written():
    decoder = tiny.attend()
    params, kv, *_ = args = arguments(decoder, 1)
    program = traced(decoder, args).lower().program
    _, logits, after = jax.jit(program)(params, kv, jnp.zeros(1, jnp.int32), jnp.full(1, 128, jnp.int32))
    assert bool(jnp.isnan(logits).all())
    for a, b in zip(jax.tree.leaves(kv), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
