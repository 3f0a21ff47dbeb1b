"""`mkdsl explain` and the pieces of `mkdsl demo`."""

import json

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

from mkdsl.engine._cli import app
from mkdsl.engine._demo import affordable, error, first_layers
from mkdsl.models import SHAPES, abstract_params, init_cache


def test_explains_a_built_in_shape():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--context", "128"])
    assert out.exit_code == 0
    for word in ("30 x", "wg·wu", "ring:", "predicted:", "proven in"):
        assert word in out.output


def test_explains_as_json():
    out = CliRunner().invoke(app, ["explain", "smollm2-135m", "--batch", "2", "--context", "128", "--json"])
    numbers = json.loads(out.output)
    assert set(numbers) == {"smem_peak_bytes", "predicted_us", "search_seconds", "verify_seconds", "tasks", "phases"}
    assert numbers["phases"] == 1 + 30 * 5 + 1
    assert 0 < numbers["smem_peak_bytes"] <= 227 * 1024


def test_unknown_model_is_refused():
    out = CliRunner().invoke(app, ["explain", "gpt-9"])
    assert out.exit_code == 1
    assert "'gpt-9' is no directory and no built-in shape" in out.output


def test_a_model_is_cut_to_its_first_layers():
    config = SHAPES["smollm2-135m"]
    kv = jax.eval_shape(lambda: init_cache(config, 64))
    zeros = jax.tree.map(lambda a: jnp.zeros((*a.shape[:1], 1)), (abstract_params(config)["layers"], kv))
    cut, params, cache = first_layers(config, {"layers": zeros[0], "norm": 0}, zeros[1], 3)
    assert cut.layers == 3
    assert {a.shape[0] for a in jax.tree.leaves((params["layers"], cache))} == {3}


@pytest.mark.parametrize(("seconds", "layers"), [(1.0, 30), (1e6, 1)])
def test_layers_that_the_time_allows(seconds, layers):
    assert affordable(SHAPES["smollm2-135m"], seconds) == layers


def test_error_is_relative():
    assert error([3.0, 4.0], [3.0, 5.0]) == pytest.approx(1 / 34**0.5)
