"""The engine's executable around a kernel: interpreted, and told of a GPU that is not there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mkdsl import gpu, models
from mkdsl.engine import SamplingParams, _decoder
from mkdsl.engine._backend import Backend, Lane, Piece
from mkdsl.engine._decoder import Pool, decode_steps, kernel_step
from mkdsl.engine._paged import empty_pages
from mkdsl.gpu import HangError
from mkdsl.graph import UnsupportedError
from mkdsl.lower import lower
from mkdsl.ops import Paged
from mkdsl.schedule import profile

TINY = models.DecoderConfig(
    hidden=64, layers=1, heads=2, kv_heads=1, head_dim=64, intermediate=64, vocab=100, eps=1e-5, theta=1e4, tied=False, max_context=128
)  # fmt: skip
SMALL = dataclasses.replace(profile("H200"), name="h200 with 2 SMs", workers=2)
GREEDY = SamplingParams(temperature=0.0)


class OnGpu:
    """What `_decoder` knows of JAX, on a machine with a GPU."""

    def __getattr__(self, name):
        return (lambda: "gpu") if name == "default_backend" else getattr(jax, name)


POOL = Pool(count=6, size=64, width=2)


def said(step_of, prompts, steps):
    """What sequences say whose pages lie here and there; the last of them goes on alone."""
    params = models.random_params(TINY, jax.random.key(3))
    backend = Backend(TINY, params, pages=6, page_size=64, context=128, max_batch=2, steps=steps, step_of=step_of)
    lanes = []
    for slot, (prompt, pages) in enumerate(zip(prompts, ([3], [1, 4]), strict=True)):
        backend.occupy(slot, params=GREEDY, seed=0, prompt=prompt, ends=(), max_tokens=9)
        backend.prefill([Piece(tokens=prompt[:-1], start=0, pages=pages)])
        lanes.append(Lane(slot=slot, pages=pages, params=GREEDY))
    flights = backend.decode(lanes, batch=2), backend.decode(lanes[1:], batch=2)
    return [[s.tokens for s in flight.land()] for flight in flights]


@pytest.mark.slow
def test_interpreted_kernels_say_what_the_reference_does(monkeypatch, race_detector):
    """Over the end of a page, and with a place in the batch that nobody has."""
    monkeypatch.setattr(_decoder, "jit", functools.partial(gpu.jit, interpret=True))
    monkeypatch.setattr(_decoder, "lower", functools.partial(lower, interpret=True))
    kernels = functools.cache(
        lambda batch: kernel_step(TINY, POOL, batch, target=SMALL).f
    )  # what is interpreted calls Python: it cannot be kept
    prompts = [[5, 6, 7, 8], list(range(20, 83))]
    assert said(kernels, prompts, 2) == said(decode_steps(TINY, POOL), prompts, 2)


@pytest.mark.medium
def test_one_step_for_each_batch(monkeypatch):
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    step_of = decode_steps(TINY, POOL)
    assert step_of(4) is step_of(4)
    pages = jax.eval_shape(lambda: empty_pages(TINY, count=6, size=64))
    integers, kv = jax.ShapeDtypeStruct((4,), jnp.int32), Paged(pages, jax.ShapeDtypeStruct((4, 2), jnp.int32))
    logits, after = jax.eval_shape(step_of(4), models.abstract_params(TINY), kv, integers, integers)
    assert (logits.shape, logits.dtype) == ((4, 100), jnp.float32)
    assert after == kv


def test_what_no_kernel_takes_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    with pytest.raises(UnsupportedError, match="head_dim=40"):
        decode_steps(dataclasses.replace(TINY, head_dim=40), POOL)


def test_a_step_with_a_deadline_says_what_its_workers_noted(monkeypatch):
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    monkeypatch.setattr(_decoder, "jit", functools.partial(gpu.jit, target="h200"))
    step = decode_steps(TINY, POOL, 1.0)(2)
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    kv = Paged(jax.eval_shape(lambda: empty_pages(TINY, count=6, size=64)), jax.ShapeDtypeStruct((2, 2), jnp.int32))
    args = models.abstract_params(TINY), kv, integers, integers
    *out, counters = jax.eval_shape(step.watched, *args)
    assert tuple(out) == jax.eval_shape(step, *args)
    left = np.full(counters.shape, -1, np.int32)
    step.check(left)
    left[-2:] = 0
    with pytest.raises(HangError, match=r"1 of 132 workers gave up waiting for each other, 1\.0 s after the kernel began"):
        step.check(left)
