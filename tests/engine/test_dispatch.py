"""How many decode steps a dispatch has."""

import pytest

from mkdsl.engine._engine import steps_of
from mkdsl.models import SHAPES
from mkdsl.schedule import profile


@pytest.mark.parametrize(
    ("model", "gpu", "steps"),
    [("smollm2-135m", "h200", 4), ("llama-3.2-1b", "h200", 4), ("llama-3.2-1b", "l20", 1), ("llama-3.1-8b", "h200", 1), ("llama-3.1-8b", None, 1)],
)  # fmt: skip
def test_as_many_as_the_host_needs_time_for(model, gpu, steps):
    assert steps_of(SHAPES[model], profile(gpu) if gpu else None) == steps
