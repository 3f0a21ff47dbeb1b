"""The pieces of `mkdsl demo`; the whole takes minutes."""

import jax
import jax.numpy as jnp
import pytest

from mkdsl.engine import Engine, SamplingParams
from mkdsl.engine._demo import affordable, error, first_layers, float32, greedy, work
from mkdsl.models import SHAPES, decode_step, init_cache, load

SMOLLM2 = SHAPES["smollm2-135m"]


@pytest.mark.medium
def test_a_model_is_cut_to_its_first_layers(checkpoint):
    whole, weights = load(checkpoint)
    config, params, kv = first_layers(whole, weights, init_cache(whole, 64), 1)
    assert config.layers == 1
    assert {a.shape[0] for a in jax.tree.leaves((params["layers"], kv))} == {1}
    assert params["embed"] is weights["embed"]
    token, logits, kv = decode_step(config)(params, kv, jnp.int32(5), jnp.int32(3))
    assert int(token) == int(logits.argmax())
    assert kv["k"].shape[0] == 1


@pytest.mark.medium
def test_the_error_is_relative_to_the_reference(checkpoint):
    config, weights = load(checkpoint)
    kv, step = init_cache(config, 64), decode_step(config)
    ours, theirs = (step(params, kv, jnp.int32(5), jnp.int32(0))[1] for params in (weights, float32(weights)))
    assert error(theirs, theirs) == 0
    assert 0 < error(ours, theirs) < 0.05
    assert error([3.0, 4.0], [3.0, 5.0]) == pytest.approx(1 / 34**0.5)


@pytest.mark.medium
def test_the_reference_says_what_the_engine_does(checkpoint):
    """Here that has the same decode step, on the same weights."""
    config, params = load(checkpoint)
    with Engine.load(checkpoint, max_batch=1, context=256) as engine:
        prompt = engine.tokenizer.encode("hello")
        ((answer,),) = engine.generate([prompt], SamplingParams(temperature=0, max_tokens=8))
    assert greedy(config, params, prompt, 8) == list(answer.tokens)


@pytest.mark.medium
@pytest.mark.parametrize(("seconds", "layers"), [(1.0, 30), (110.0, 2), (1e6, 1)])
def test_layers_that_the_time_allows(seconds, layers):
    assert affordable(SMOLLM2, seconds) == layers


def test_work_is_as_measured():
    assert work(SMOLLM2, 3) / work(SMOLLM2, 1) == pytest.approx(167.3 / 92.6, rel=0.2)  # which was of another schedule
