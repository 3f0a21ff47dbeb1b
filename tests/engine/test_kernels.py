"""The engine's executable around a kernel: interpreted, and told of a GPU that is not there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import pytest

from mkdsl import gpu, models
from mkdsl.engine import SamplingParams, _decoder
from mkdsl.engine._backend import Backend, Lane
from mkdsl.engine._decoder import decode_steps, kernel_step
from mkdsl.graph import UnsupportedError
from mkdsl.lower import lower
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


def said(step_of, prompts, steps):
    """What sequences say whose pages lie here and there; the last of them goes on alone."""
    params = models.random_params(TINY, jax.random.key(3))
    backend = Backend(TINY, params, pages=6, page_size=64, context=128, max_batch=2, max_steps=steps, step_of=step_of)
    lanes = []
    for slot, (prompt, pages) in enumerate(zip(prompts, ([3], [1, 4]), strict=True)):
        backend.occupy(slot, params=GREEDY, seed=0, prompt=prompt, ends=())
        backend.prefill(prompt[:-1], start=0, pages=pages)
        lanes.append(Lane(slot=slot, pages=pages, token=prompt[-1], position=len(prompt) - 1, index=0, params=GREEDY))
    together = [s.tokens for s in backend.decode(lanes, batch=2, steps=steps, until_one_ends=False)]
    last = dataclasses.replace(lanes[-1], token=together[-1][-1], position=lanes[-1].position + steps, index=steps)
    return together, [s.tokens for s in backend.decode([last], batch=2, steps=1, until_one_ends=False)]


@pytest.mark.slow
def test_interpreted_kernels_say_what_the_reference_does(monkeypatch, race_detector):
    """Over the end of a page, and with a place in the batch that nobody has."""
    monkeypatch.setattr(_decoder, "jit", functools.partial(gpu.jit, interpret=True))
    monkeypatch.setattr(_decoder, "lower", functools.partial(lower, interpret=True))
    kernels = functools.cache(
        lambda batch: kernel_step(TINY, 128, batch, target=SMALL).f
    )  # what is interpreted calls Python: it cannot be kept
    prompts = [[5, 6, 7, 8], list(range(20, 83))]
    assert said(kernels, prompts, 2) == said(decode_steps(TINY, 128), prompts, 2)


@pytest.mark.medium
def test_one_step_for_each_batch(monkeypatch):
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    step_of = decode_steps(TINY, 128)
    assert step_of(4) is step_of(4)
    params, kv, token, pos = _decoder.shapes(TINY, 128)
    kv, token, pos = jax.tree.map(lambda a: jax.ShapeDtypeStruct((4, *a.shape), a.dtype), (kv, token, pos))
    logits, after = jax.eval_shape(step_of(4), params, kv, token, pos)
    assert (logits.shape, logits.dtype) == ((4, 100), jnp.float32)
    assert after == kv


def test_what_no_kernel_takes_is_refused_at_once(monkeypatch):
    monkeypatch.setattr(_decoder, "jax", OnGpu())
    with pytest.raises(UnsupportedError, match="head_dim=40"):
        decode_steps(dataclasses.replace(TINY, head_dim=40), 128)
