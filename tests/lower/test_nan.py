"""NaN goes where it goes in the reference: no position, mask or merge hides it."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_decoders as tiny
from interpreted import CONTEXT, SMALL

import mkdsl as mk

pytestmark = [pytest.mark.medium, pytest.mark.usefixtures("race_detector")]

POSITIONS = np.asarray([0, 70], np.int32)  # of which the first attends to itself alone


def test_a_nan_in_any_weight_or_in_what_is_attended():
    """Regression: at position 0 the logits of a NaN in wq or wk were numbers."""
    decoder = tiny.attend()
    token, kv = np.asarray([3, 4], np.int32), decoder.cache(CONTEXT, batch=2)
    compiled = mk.jit(decoder.step, batch=2, target=SMALL, interpret=True)
    damaged = {name: (decoder.params | {name: weight.at[3, 5].set(jnp.nan)}, kv) for name, weight in decoder.params.items()}
    damaged |= {f"cache {name}": (decoder.params, kv | {name: kv[name].at[1, 0, 10, 7].set(jnp.nan)}) for name in "kv"}
    for name, (params, cache) in damaged.items():
        _, logits, _ = compiled(params, cache, token, POSITIONS)
        _, want, _ = dataclasses.replace(decoder, params=params).reference(cache, token, POSITIONS)
        assert np.isnan(want).any(), name
        np.testing.assert_array_equal(np.isnan(logits), np.isnan(want), err_msg=name)
